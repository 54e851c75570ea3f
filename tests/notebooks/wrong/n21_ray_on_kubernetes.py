"""Notebook 21: answers that are wrong in a known way, and honest variants."""

import math
import re
from decimal import Decimal

import yaml
from kubernetes.utils.quantity import parse_quantity


def as_it_is(text):
    return text


def three_of_four(text):
    return (
        text.replace("replica:", "replicas:").replace("num-cpus: 4", 'num-cpus: "4"').replace("2GB", "2Gi")
    )


def forgets_the_unit(text):
    return three_of_four(text).replace("2Gi", "2GB").replace("Lab_1", "lab-1")


def removes_the_group(text):
    return text.replace("Lab_1", "lab-1").split("  workerGroupSpecs")[0]


def removes_the_line(text):
    return three_of_four(text).replace("Lab_1", "lab-1").replace("      replicas: 2\n", "")


def removes_the_cores(text):
    return three_of_four(text).replace("Lab_1", "lab-1").replace('        num-cpus: "4"\n', "")


def removes_the_limit(text):
    return three_of_four(text).replace("Lab_1", "lab-1").replace(", memory: 2Gi", "")


def two_megabytes(text):
    return three_of_four(text).replace("Lab_1", "lab-1").replace("2Gi", "2Mi")


def returns_the_data(text):
    return yaml.safe_load(text)


def by_pattern(text):
    text = re.sub(r"name: Lab_1", "name: lab-1", text)
    text = re.sub(r"replica:", "replicas:", text)
    text = re.sub(r"num-cpus: (\d+)", r"num-cpus: '\1'", text)
    return re.sub(r"2GB", "2G", text)


def by_data(text):
    found = yaml.safe_load(text)
    found["metadata"]["name"] = "lab-1"
    [group] = found["spec"]["workerGroupSpecs"]
    group["replicas"] = group.pop("replica")
    group["rayStartParams"]["num-cpus"] = "4"
    group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "2048Mi"
    return yaml.safe_dump(found)


def _conditions(pod):
    return {each["type"]: each["status"] for each in pod.get("status", {}).get("conditions", [])}


def _reasons(pod, *kinds):
    status = pod.get("status", {})
    containers = [each for kind in kinds for each in status.get(kind, [])]
    return [each["state"].get("waiting", {}).get("reason", "") for each in containers]


BOTH = ("initContainerStatuses", "containerStatuses")


def _decide(ready, scheduled, reasons, events):
    if ready:
        return "ready"
    if not scheduled:
        return "no room"
    if any("Image" in reason for reason in reasons):
        return "no image"
    if "CrashLoopBackOff" in reasons:
        return "crashes"
    return "probe" if any(each["reason"] == "Unhealthy" for each in events) else "starting"


def events_first(pod, events):
    if any(each["reason"] == "Unhealthy" for each in events):
        return "probe"
    return right_in_order(pod, events)


def takes_text_for_truth(pod, events):
    conditions = _conditions(pod)
    return _decide(
        conditions.get("Ready"), conditions.get("PodScheduled", True), _reasons(pod, *BOTH), events
    )


def knows_one_image_reason(pod, events):
    answer = right_in_order(pod, events)
    return "starting" if answer == "no image" and "ErrImagePull" not in _reasons(pod, *BOTH) else answer


def first_container_alone(pod, events):
    conditions = _conditions(pod)
    reasons = _reasons(pod, "containerStatuses")[:1]
    return _decide(
        conditions.get("Ready") == "True", conditions.get("PodScheduled") != "False", reasons, events
    )


def forgets_init_containers(pod, events):
    conditions = _conditions(pod)
    reasons = _reasons(pod, "containerStatuses")
    return _decide(
        conditions.get("Ready") == "True", conditions.get("PodScheduled") != "False", reasons, events
    )


def wants_a_status(pod, events):
    pod["status"]["conditions"]
    return right_in_order(pod, events)


def unscheduled_without_conditions(pod, events):
    if _conditions(pod).get("PodScheduled") != "True":
        return "no room"
    return right_in_order(pod, events)


def in_his_own_words(pod, events):
    return right_in_order(pod, events).replace("no image", "ErrImagePull")


def right_in_order(pod, events):
    conditions = _conditions(pod)
    return _decide(
        conditions.get("Ready") == "True",
        conditions.get("PodScheduled") != "False",
        _reasons(pod, *BOTH),
        events,
    )


def right_with_loops(pod, events):
    status = pod.get("status") or {}
    for each in status.get("conditions") or []:
        if each["type"] == "Ready" and each["status"] == "True":
            return "ready"
    for each in status.get("conditions") or []:
        if each["type"] == "PodScheduled" and each["status"] == "False":
            return "no room"
    for word, sign in (("no image", "Image"), ("crashes", "CrashLoopBackOff")):
        for kind in BOTH:
            for each in status.get(kind) or []:
                if sign in str((each["state"].get("waiting") or {}).get("reason")):
                    return word
    for event in events:
        if event["reason"] == "Unhealthy":
            return "probe"
    return "starting"


def _sums(pods):
    return [sum(parse_quantity(each[what]) for each in pods) for what in ("cpu", "memory")]


def cores_alone(free, pods):
    return int(parse_quantity(free["cpu"]) // _sums(pods)[0])


def memory_alone(free, pods):
    return int(parse_quantity(free["memory"]) // _sums(pods)[1])


def takes_the_more_plentiful(free, pods):
    return max(cores_alone(free, pods), memory_alone(free, pods))


def counts_the_largest_pod(free, pods):
    largest = [max(parse_quantity(each[what]) for each in pods) for what in ("cpu", "memory")]
    return int(
        min(parse_quantity(free[w]) // one for w, one in zip(("cpu", "memory"), largest, strict=True))
    )


def keeps_the_fraction(free, pods):
    cpu, memory = _sums(pods)
    return float(min(parse_quantity(free["cpu"]) / cpu, parse_quantity(free["memory"]) / memory))


def rounds_up(free, pods):
    return math.ceil(keeps_the_fraction(free, pods))


def leaves_one_over(free, pods):
    return counted(free, pods) - 1


def takes_g_for_gi(free, pods):
    free = dict(free)
    if free["memory"].endswith("G"):
        free["memory"] += "i"
    return counted(free, pods)


def counted(free, pods):
    cpu, memory = parse_quantity(free["cpu"]), parse_quantity(free["memory"])
    one, count = _sums(pods), 0
    while cpu >= one[0] and memory >= one[1]:
        cpu, memory, count = cpu - one[0], memory - one[1], count + 1
    return count


def in_whole_millicores(free, pods):
    def number(text):
        units = {"m": Decimal("0.001"), "Mi": 2**20, "Gi": 2**30, "G": 10**9}
        for unit, factor in units.items():
            if text.endswith(unit):
                return Decimal(text.removesuffix(unit)) * factor
        return Decimal(text)

    return min(
        int(1000 * number(free[w])) // int(sum(1000 * number(each[w]) for each in pods))
        for w in ("cpu", "memory")
    )


WRONG = {
    "21.1": [
        (as_it_is, "3 errors left"),
        (three_of_four, "name"),
        (forgets_the_unit, "quantity"),
        (removes_the_group, "worker group is gone"),
        (removes_the_line, "expected 2"),
        (removes_the_cores, "num-cpus"),
        (removes_the_limit, "memory limit is gone"),
        (two_megabytes, "not 2 gigabytes"),
        (returns_the_data, "text of the manifest"),
    ],
    "21.2": [
        (events_first, "whose probe failed while it started"),
        (takes_text_for_truth, "expected 'no room'"),
        (knows_one_image_reason, "expected 'no image'"),
        (first_container_alone, "second container"),
        (forgets_init_containers, "init container"),
        (wants_a_status, "without any status"),
        (unscheduled_without_conditions, "no conditions"),
        (in_his_own_words, "expected one of"),
    ],
    "21.3": [
        (cores_alone, "scarcer"),
        (memory_alone, "scarcer"),
        (takes_the_more_plentiful, "scarcer"),
        (counts_the_largest_pod, "all its pods together"),
        (keeps_the_fraction, "whole clusters only"),
        (rounds_up, "round down"),
        (leaves_one_over, "one cluster less"),
        (takes_g_for_gi, "different units"),
    ],
}
RIGHT = {
    "21.1": [by_pattern, by_data],
    "21.2": [right_in_order, right_with_loops],
    "21.3": [counted, in_whole_millicores],
}
