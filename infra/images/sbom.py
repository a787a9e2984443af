"""Bills of materials of the images, in CycloneDX: the packages of Debian and of Python that are in them."""

import importlib.metadata
import re
import uuid
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from pydantic import BaseModel, ConfigDict

from infra.images.oci import CREATED


class Package(BaseModel):
    """A package of an image."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """`deb` or `pypi`."""
    name: str
    version: str
    architecture: str = ""


def debian_packages(root: Path) -> list[Package]:
    """The packages that dpkg installed in a tree."""
    found = []
    for paragraph in (root / "var/lib/dpkg/status").read_text(encoding="utf-8").strip().split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture): (\S+)$", paragraph, re.MULTILINE))
        name, version = fields["Package"], fields["Version"]
        found.append(Package(kind="deb", name=name, version=version, architecture=fields["Architecture"]))
    return found


def python_packages(site_packages: Path) -> list[Package]:
    """The distributions below a folder of packages."""
    found = importlib.metadata.distributions(path=[str(site_packages)])
    return [Package(kind="pypi", name=_normal(each.name), version=each.version) for each in found]


def bill_of_materials(image: str, digest: str, packages: Iterable[Package]) -> str:
    """The bill as JSON; the same image gives the same text.

    Args:
        image: name with tag.
        digest: of the image's manifest.
        packages: what is in the image.
    """
    name, _, version = image.rpartition(":")
    subject = Component(type=ComponentType.CONTAINER, name=name, version=version, bom_ref="image")
    subject.properties.add(Property(name="oci:manifest:digest", value=digest))
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, digest), components=map(_component, packages))
    bom.metadata.component, bom.metadata.timestamp = subject, datetime.fromisoformat(CREATED)
    bom.register_dependency(subject, bom.components)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1) + "\n"


def _component(package: Package) -> Component:
    qualifiers = {"arch": package.architecture} if package.architecture else None
    namespace = "debian" if package.kind == "deb" else None
    purl = PackageURL(package.kind, namespace, package.name, package.version, qualifiers=qualifiers)
    return Component(
        type=ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        purl=purl,
        bom_ref=purl.to_string(),
    )


def _normal(name: str) -> str:
    """The name of a distribution as an index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()
