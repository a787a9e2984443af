"""Fails until containerd answers the kubelet: `python cri_ready.py SOCKET`. It answers `ctr` earlier."""

import sys

import grpc


def main(socket: str) -> None:
    """Ask for the version of the runtime, with an empty request."""
    with grpc.insecure_channel(f"unix://{socket}") as channel:
        channel.unary_unary("/runtime.v1.RuntimeService/Version")(b"", timeout=5)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except grpc.RpcError as error:
        sys.exit(f"containerd does not answer the kubelet: {error}")
