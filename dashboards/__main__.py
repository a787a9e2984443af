"""Write the dashboards and the alerts: `python -m dashboards`.

Helm packages only what is in the folder of the chart, so the files are there and nowhere else.
"""

from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import alerts, fleet, rl, run, search, serving, training

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "tessera"
DASHBOARDS = {
    "run": run.build,
    "training": training.build,
    "rl": rl.build,
    "search": search.build,
    "serving": serving.build,
    "fleet": fleet.build,
}


def files() -> dict[Path, str]:
    """Every file that is made, with its text."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    made = {
        CHART / f"dashboards/{name}.json": encoder.encode(build().build()) + "\n" for name, build in DASHBOARDS.items()
    }
    made[CHART / "rules/alerts.yaml"] = yaml.safe_dump(alerts.rules(), sort_keys=False, width=1000)
    made[ROOT / "dashboards/alerts.md"] = alerts.page()
    return made


def main() -> None:
    """Write the files that have changed."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
