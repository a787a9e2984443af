import json
from pathlib import Path
from typing import Any

from infra.images.sbom import Package, bill_of_materials, debian_packages, python_packages

STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u10
Description: GNU C Library
 Package: none, since this line belongs to the description

Package: ca-certificates
Architecture: all
Version: 20230311
"""


def bill(*packages: Package) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(bill_of_materials("tessera/core:1.2", "sha256:ab", packages))
    return parsed


def test_debian_packages_are_those_of_dpkg(tmp_path: Path) -> None:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    assert [(each.name, each.version, each.architecture) for each in debian_packages(tmp_path)] == [
        ("libc6", "2.36-9+deb12u10", "amd64"),
        ("ca-certificates", "20230311", "all"),
    ]


def test_python_packages_have_the_names_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "Typing_Extensions-4.0.dist-info").mkdir()
    (tmp_path / "Typing_Extensions-4.0.dist-info" / "METADATA").write_text("Name: Typing_Extensions\nVersion: 4.0\n")
    assert python_packages(tmp_path) == [Package(kind="pypi", name="typing-extensions", version="4.0")]


def test_a_bill_names_the_image_by_its_digest_and_each_package_by_its_address() -> None:
    made = bill(
        Package(kind="deb", name="libc6", version="2.36-9+deb12u10", architecture="amd64"),
        Package(kind="pypi", name="numpy", version="2.1"),
    )
    assert made["bomFormat"] == "CycloneDX"
    assert (made["metadata"]["component"]["name"], made["metadata"]["component"]["version"]) == ("tessera/core", "1.2")
    assert made["metadata"]["component"]["properties"] == [{"name": "oci:manifest:digest", "value": "sha256:ab"}]
    assert {each["purl"] for each in made["components"]} == {
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64",
        "pkg:pypi/numpy@2.1",
    }


def test_the_same_image_has_the_same_bill_in_any_order_of_its_packages() -> None:
    packages = [Package(kind="pypi", name=name, version="1") for name in ("a", "b", "c")]
    assert bill_of_materials("a:1", "sha256:ab", packages) == bill_of_materials("a:1", "sha256:ab", packages[::-1])
    assert bill() == bill()
