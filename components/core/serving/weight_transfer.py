"""New weights for a running vLLM, through its weight-transfer API.

In reinforcement learning the trainer is in the engine's process and passes its tensors. A server receives the path of
another checkpoint of the same architecture. Both use vLLM's layer-wise reload, which repacks the weights for the
kernels and keeps their storage.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from components.core.model.checkpoint import read_weights
from components.core.model.inspection import read_architecture
from components.core.model.layer_numbering import name_in_files

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM has no type hints
    """Empty: no connection is opened."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Source of the weights: tensors of this process, or a folder of safetensors files."""

    tensors: NamedTensors | None = None
    folder: str | None = None


class TesseraWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Loads weights under their Hugging Face names into the model of this worker."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Do nothing, because there is no connection to open."""

    def start_weight_update(self) -> None:
        """Prepare every layer to receive weights."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load the weights."""
        if update_info.tensors is not None:
            self._load(update_info.tensors)
        if update_info.folder is not None:
            self._load(read_weights(Path(update_info.folder)))

    def _load(self, weights: NamedTensors) -> None:
        """Load weights under the layer numbers of the served folder, which may have gaps."""
        numbers = read_architecture(Path(self.model_config.model)).layer_numbers
        self.model.load_weights((name_in_files(name, numbers), tensor) for name, tensor in weights)

    def finish_weight_update(self) -> None:
        """Repack the received weights for the kernels."""
        finalize_layerwise_reload(self.model, self.model_config)
        head, embedding = self.model.lm_head, self.model.model.embed_tokens
        if head.weight.data_ptr() == embedding.weight.data_ptr():
            # The reload fills a tied embedding; on a CPU the head has a packed copy of it. The configuration does not
            # tell whether they are tied: vLLM changes it where the folder stores a head.
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Do nothing, because there is no connection to close."""
