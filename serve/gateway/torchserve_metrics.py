"""TorchServe's own metrics, as its metrics port tells them, under our names of models."""

import re
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

# As Java writes it.
_NUMBER = r"-?[0-9.]+(?:E-?[0-9]+)?"


def relabel(text: str, names: Mapping[str, str]) -> Iterator[Metric]:
    """TorchServe's counters and gauges with our names of models and no other label: host names say nothing here.

    Samples that then look alike become one: counters add up, of gauges the last one stays. Those of a worker are left
    out: its name never comes again. names: the archive's name by TorchServe's name. The library's parser takes 50 µs
    a line, as long as all the rest.
    """
    counters = set(re.findall(r"^# TYPE (\w+) counter$", text, re.MULTILINE))
    families: dict[str, dict[tuple[str, ...], float]] = {}
    for name, label_text, value in re.findall(rf"^(\w+)(?:{{(.*)}})? ({_NUMBER})$", text, re.MULTILINE | re.ASCII):
        labels = _our_labels(dict(re.findall(r'(\w+)="([^"]*)"', label_text)), names)
        if labels is not None:
            values = families.setdefault(name, {})
            values[labels] = float(value) + (values.get(labels, 0.0) if name in counters else 0.0)
    for name, values in families.items():
        yield _family(name, name in counters, values)


def _our_labels(labels: Mapping[str, str], names: Mapping[str, str]) -> tuple[str, ...] | None:
    """The values of the label `model`, if any; None for a sample that is left out."""
    engine_name = labels.get("model_name") or labels.get("ModelName")
    if "WorkerName" in labels or (engine_name and engine_name not in names):
        return None
    return (names[engine_name],) if engine_name else ()


def _family(name: str, counter: bool, values: Mapping[tuple[str, ...], float]) -> Metric:
    kind = CounterMetricFamily if counter else GaugeMetricFamily
    family = kind(name, "TorchServe's own.", labels=["model"])
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
