"""A Ray cluster that somebody else runs: joined, looked at before anything is asked of it, and left as it was.

A search joins from one of the cluster's own machines. Trials then run wherever the cluster has room; what they need,
and what they learn, goes through a run storage that all nodes see (see `foldsearch.search.shipping`). Without one they
stay on the node that the search was started on, which must be the only one with room.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from foldsearch.errors import RunError, last_lines, quote_error
from foldsearch.machine import gpu_share, num_cpus, num_gpus
from foldsearch.paths import printable
from foldsearch.search.own_ray import (
    check_machine,
    check_process,
    choose_place,
    patched_for_start,
    quiet,
    shut_down,
    temporary_folder,
    watched,
)
from foldsearch.signals import handlers_kept, uninterrupted
from foldsearch.spec.study import ClusterSettings, Study
from foldsearch.store import Store, StoreError, absolute
from foldsearch.version import __version__

VARIABLE = "RAY_ADDRESS"
LOCAL = "local"  # as an address: a Ray of our own, whatever the environment says
ANSWER_SECONDS = 30.0  # that a cluster, and then each of its nodes, has to answer
_KNOCK_SECONDS = 5.0
_SAME = ("torch", "transformers")  # beside foldsearch: packages whose versions decide figures
_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of the cluster"

# Runs in a process of its own: where no GCS is, Ray's C++ tries for minutes, and may end the process.
_PROBE = """
import json, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient
try:
    print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1])) or {}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__}))
"""


@dataclass(frozen=True, slots=True)
class Share:
    """What one trial takes. cpus: whole cores. gpus: a part of one GPU, or whole ones."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        return _amounts(self.cpus, self.gpus)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster. name: its address. cpus, gpus: that it has in all, used ones too."""

    id: str
    name: str
    cpus: float
    gpus: float

    def num_trials(self, share: Share) -> int:
        """Trials that it has room for, if nothing else runs there."""
        by_gpus = int(self.gpus / share.gpus + 1e-6) if share.gpus else sys.maxsize
        return min(int(self.cpus // share.cpus), by_gpus)


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where the trials of a search run.

    Attributes:
        share: what one of them takes.
        joined: a folder for Tune's state, where a running cluster was joined; None where Ray is to be of our own.
        cpus, gpus: that a Ray of our own is to hand out.
        home: id of the node that the search runs on; "" where Ray is of our own.
        pinned: a resource that only that node has, where trials are to stay there; else "".
        storage: the run storage; "" where trials stay where they can read the run's folder.
    """

    share: Share
    joined: Path | None = None
    cpus: int = 0
    gpus: int = 0
    home: str = ""
    pinned: str = ""
    storage: str = ""

    def resources(self) -> dict[str, float]:
        """Of one trial, as Tune takes them."""
        pin = {self.pinned: 0.001} if self.pinned else {}
        return {"cpu": self.share.cpus, "gpu": self.share.gpus, **pin}


@contextmanager
def workplace(study: Study, again: str) -> Iterator[Workplace]:
    """Where the trials of a study are to run; a cluster is joined meanwhile. What cannot be is told within a minute.

    Args:
        study: says where, and how many trials run at a time.
        again: the command that goes on with the run, for the message of a cluster that is lost.

    Raises:
        RunError: there is no such cluster, or it cannot run a trial of this study.
        InputError: the run storage or the current folder cannot be used.
    """
    if address := address_of(study.cluster):
        check_process()
        place = choose_place()
        with quiet(joins=True), temporary_folder(place) as folder, _joined(_checked(address), again):
            yield _look_around(study, address, folder)
    else:
        check_machine()
        yield _on_this_machine(study)


def address_of(settings: ClusterSettings) -> str:
    """The cluster to join; "" for none."""
    address = settings.address or os.environ.get(VARIABLE, "")
    return "" if address == LOCAL else address


# ---- this machine


def _on_this_machine(study: Study) -> Workplace:
    cpus = max(num_cpus(), study.jobs)
    settings = study.cluster
    # To look for GPUs takes seconds, the import of torch: not before it is known that the study can be run here.
    gpus = num_gpus() if settings.gpus_per_trial else 0
    for what, wanted, there in (
        ("cores", settings.cpus_per_trial, cpus),
        ("GPUs", settings.gpus_per_trial, gpus),
    ):
        if wanted is not None and wanted > there:
            raise RunError(
                f"a trial has to fit this machine, but it takes {wanted:g} {what}, and there are {there}. Lower "
                f"--{'cpus' if what == 'cores' else 'gpus'}-per-trial, or name a cluster with --address."
            )
    return Workplace(Share(settings.cpus_per_trial or cpus // study.jobs, 0.0), cpus=cpus)


def on_device(place: Workplace, study: Study, device: str) -> Workplace:
    """The workplace with the GPUs of this machine, where Ray is of our own and the model on a GPU."""
    if place.joined is not None or device != "cuda":
        return place
    gpus = num_gpus()
    wanted = study.cluster.gpus_per_trial
    share = Share(place.share.cpus, gpu_share(gpus, study.jobs) if wanted is None else wanted)
    return Workplace(share, cpus=place.cpus, gpus=gpus)


# ---- whether a cluster answers


def _checked(address: str) -> str:
    """The address as host:port, once a cluster of our version of Ray has answered there.

    Raises:
        RunError: none does.
    """
    if "://" in address:
        raise RunError(
            f"a search joins a cluster from one of its machines, by host:port or auto; got '{printable(address)}'. "
            "Start it there, for example with `ray job submit`."
        )
    if address == "auto":
        try:
            address = str(ray._private.services.canonicalize_bootstrap_address_or_die("auto"))
        except ConnectionError as error:
            raise _no_answer("auto", "no Ray runs on this machine") from error
    if not (parts := re.fullmatch(r"\[?([^\]]+?)\]?:(\d{1,5})", address)):
        raise RunError(f"a cluster's address is host:port, or auto; got '{printable(address)}'.")
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _no_answer(address, getattr(error, "strerror", None) or str(error)) from error
    _check_versions(address, _metadata(address))
    if not (find := getattr(ray._private.services, "find_node_ids", None)) or find():
        return address
    raise RunError(
        f"a search joins a cluster from one of its machines, but none of the nodes of '{printable(address)}' is this "
        f"one. Start it there, or let this machine join first: ray start --address={address}"
    )


def _no_answer(address: str, reason: str) -> RunError:
    return RunError(
        f"a Ray cluster must answer at the address, but none does at '{printable(address)}': {reason.rstrip('.')}. "
        "Look at what `ray status` says on its head; without --address (and RAY_ADDRESS) this machine is used alone."
    )


def _metadata(address: str) -> dict[str, Any]:
    """What the cluster says of its versions; empty where it says nothing."""
    try:
        said = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            check=False,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
        found: dict[str, Any] = json.loads(said.stdout)
    except subprocess.TimeoutExpired as error:
        raise _no_answer(
            address, f"it is not Ray that listens there, or it said nothing for {ANSWER_SECONDS:g} s"
        ) from error
    except ValueError as error:
        raise _no_answer(address, last_lines(said.stderr) or "it closed the connection") from error
    if found.get("error") == "AuthenticationError":
        raise RunError(
            f"the Ray cluster at '{printable(address)}' lets in who has its token, but ours is missing or another. "
            f"To join, {_TOKEN}."
        )
    if "error" in found:
        raise _no_answer(address, f"it is not Ray that listens there ({found['error']})")
    return found


def _check_versions(address: str, found: dict[str, Any]) -> None:
    ours = {"ray_version": ray.__version__, "python_version": ".".join(map(str, sys.version_info[:3]))}
    names = {"ray_version": "Ray", "python_version": "Python"}
    for key, mine in ours.items():
        if (theirs := found.get(key, mine)) != mine:
            raise RunError(
                f"a search and its cluster must have the same version of {names[key]}, but the cluster at "
                f"'{printable(address)}' has {theirs}, and this is {mine}. Install that one here, or start the search "
                "from the image of the cluster's nodes."
            )


# ---- joining


@contextmanager
def _joined(address: str, again: str) -> Iterator[None]:
    """Connected to a cluster; whoever connected before us keeps their connection.

    Raises:
        RunError: it cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    try:
        try:
            with handlers_kept(), patched_for_start():
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    configure_logging=False,
                )
        except Exception as error:
            what = f"the Ray cluster at '{printable(address)}' cannot be joined"
            raise RunError(quote_error(what, error, "Look at what `ray status` says there.")) from error
        with watched(_raylets(), again):
            yield
    finally:
        with uninterrupted():
            shut_down()


def _raylets() -> list[psutil.Process]:
    """The process of the cluster on this machine that the search speaks with."""
    home, found = ray.get_runtime_context().get_node_id(), []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "raylet" and any(home in word for word in process.cmdline()):
                found.append(process)
    return found


# ---- whether it can run trials


def _look_around(study: Study, address: str, folder: Path) -> Workplace:
    settings, home = study.cluster, ray.get_runtime_context().get_node_id()
    nodes = [
        Node(one["NodeID"], one["NodeManagerAddress"], of.get("CPU", 0.0), of.get("GPU", 0.0))
        for one in ray.nodes()  # type: ignore[no-untyped-call]
        if one["Alive"] and (of := one["Resources"]) is not None
    ]
    share = fair_share(nodes, settings, study.jobs, wants_gpu=study.device in ("auto", "cuda"))
    able = [node for node in nodes if node.num_trials(share)]
    if not able:
        most = max(nodes, key=lambda node: (node.gpus, node.cpus))
        raise RunError(
            f"a trial has to fit one node, but it takes {share}, and of the {len(nodes)} nodes at "
            f"'{printable(address)}' the largest has {_amounts(most.cpus, most.gpus)}. Lower --cpus-per-trial and "
            "--gpus-per-trial, or start such a node first."
        )
    if settings.run_storage is None:
        if [node.id for node in able] != [home]:
            raise RunError(
                f"trials that run on several machines need a place that all of them see, but none is named for the "
                f"{len(nodes)} nodes at '{printable(address)}'. Name one: --run-storage PATH, or a URL such as "
                "s3://bucket/folder"
            )
        here = next(node for node in able if node.id == home)
        return Workplace(share, folder, home=home, pinned=f"node:{here.name}")
    place = absolute(settings.run_storage)
    _look_at_nodes(able, place)
    return Workplace(share, folder, home=home, storage=place)


def _look_at_nodes(nodes: Sequence[Node], place: str) -> None:
    """Whether each node can run a trial: it has our foldsearch, a cache, and sees the run storage.

    Raises:
        RunError: one cannot.
    """
    name, words = f"probes/{secrets.token_hex(8)}", secrets.token_hex(8)
    try:
        store = Store(place)
        store.write(name, words)
    except StoreError as error:
        raise RunError(str(error)) from error
    look = ray.remote(num_cpus=0, max_retries=0)(_looker())
    try:
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                place, name, words, _versions()
            ): node
            for node in nodes
        }
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for task, node in asked.items():
            where = f"every node with room for a trial must be able to run one, but that at {node.name}"
            if task in late:
                raise RunError(
                    f"{where} said nothing for {ANSWER_SECONDS:g} s. Look at it with `ray status`."
                )
            try:
                fault = ray.get(task)
            except ray.exceptions.RayError as error:
                raise RunError(quote_error(f"{where} cannot be asked", error)) from error
            if fault:
                raise RunError(f"{where} {fault}")
    finally:
        with suppress(StoreError):
            store.remove(name)


def _versions() -> dict[str, str]:
    """Of what must be the same everywhere; a build for other devices ("2.13.0+cpu") is the same version."""
    found = {"foldsearch": __version__}
    for package in _SAME:
        with suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]
    return found


def _looker() -> Callable[[str, str, str, dict[str, str]], str]:
    """What a node runs to look whether it can run trials; it returns what is wrong there, or "".

    Made in here, it is sent as code, and not by the name of a module that the node may lack.
    """

    def look(place: str, name: str, words: str, versions: dict[str, str]) -> str:
        from importlib.metadata import PackageNotFoundError, version

        wanted = versions.pop("foldsearch")
        try:
            from foldsearch.cache import default_cache_dir
            from foldsearch.files import check_writable
            from foldsearch.store import Store
            from foldsearch.version import __version__ as found
        except ImportError as error:
            return f"has no foldsearch ({error}). Install foldsearch {wanted} there."
        if found != wanted:
            return f"has foldsearch {found}, and this is {wanted}. Install that one there."
        for package, wanted in versions.items():
            try:
                found = version(package).partition("+")[0]
            except PackageNotFoundError:
                found = "none"
            if found != wanted:
                return f"has {package} {found}, and this is {wanted}. Install that one there."
        try:
            check_writable(default_cache_dir(), "the cache there", "Set FOLDSEARCH_CACHE in its environment.")
            store = Store(place)
            if store.read(name) != words:
                return (
                    f"does not see what was just written to the run storage '{place}'. Name a path or a URL that is "
                    "the same place on all nodes."
                )
            store.write(f"{name}-again", words)
            store.remove(f"{name}-again")
        except Exception as error:
            return f"cannot be used: {error}"
        return ""

    return look


def fair_share(nodes: Sequence[Node], settings: ClusterSettings, jobs: int, *, wants_gpu: bool) -> Share:
    """What a trial takes where the study does not say: a GPU where there are some, and as many cores as each of `jobs`
    trials can have at the same time; at least one.
    """
    gpus = settings.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if wants_gpu and any(node.gpus for node in nodes) else 0.0
    if settings.cpus_per_trial is not None:
        return Share(settings.cpus_per_trial, gpus)
    most = max((int(node.cpus) for node in nodes), default=1)
    shares = (Share(cpus, gpus) for cpus in range(most, 0, -1))
    return next(
        (share for share in shares if sum(node.num_trials(share) for node in nodes) >= jobs), Share(1, gpus)
    )


def _amounts(cpus: float, gpus: float) -> str:
    words = f"{cpus:g} core{'s' * (cpus != 1)}"
    return f"{words} and {gpus:g} GPU{'s' * (gpus > 1)}" if gpus else words
