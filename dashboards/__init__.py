"""Dashboards of Grafana and alerts of Prometheus, made from the metrics that core declares.

`python -m dashboards` writes them into the chart, and the page of the alerts beside this file.
"""
