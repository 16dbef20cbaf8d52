"""AdapterSession: an ONNX Runtime session that knows its sites and picks adapters per run and per row."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from adapterx.adapter import Adapter
from adapterx.errors import FeedError, MismatchError, OptionError
from adapterx.formats import load_adapter as read_adapter
from adapterx.manifest import Manifest
from adapterx.port_dtype import AdapterDtype
from adapterx.runtime.baked import BakedModels
from adapterx.runtime.bank import AdapterBank
from adapterx.runtime.base_tensors import BaseTensors
from adapterx.runtime.bound import Bound
from adapterx.runtime.fed import FedModel
from adapterx.runtime.fit import fit
from adapterx.runtime.inference import Host, Provider, ort
from adapterx.runtime.kernels import KernelMode, Kernels
from adapterx.runtime.mixed import check_mixable, mixed_feeds
from adapterx.runtime.options import entry
from adapterx.runtime.ports import port_names
from adapterx.runtime.resident import Identity, Resident, Runnable
from adapterx.runtime.residents import Residents
from adapterx.runtime.rows import RowAdapter, Rows, shown
from adapterx.runtime.signature import Signature, TensorInfo
from adapterx.runtime.source import FOLDER_OPTION, ModelLike, ModelSource, read_source
from adapterx.site import SiteTable

AdapterLike: TypeAlias = Adapter | str | os.PathLike[str]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AdapterSession:
    """One base model, many adapters; safe to use from many threads at once.

    ``run`` takes no lock. It takes a reference to the adapter that it finds under the name, and computes with that one
    to the end, whatever is loaded, replaced or unloaded meanwhile.

    Args:
        model: a path, the bytes of a model, or a ``ModelProto`` (bytes only without external data). A model that was
            neither extracted nor injected gets ports in memory, for the sites of ``adapters``; it must then be a path,
            or have no external data.
        adapters: names -> paths or adapters, as for :meth:`load_adapter`
        providers: as for ``onnxruntime.InferenceSession``; one that is missing or does not start is an error here
        session_options: the host's own; used, never changed but for ``kernels``. In external mode every adapter needs
            options of its own, and gets copies, which cannot carry what ONNX Runtime does not give back (custom
            operator libraries).
        provider_options: as for ``onnxruntime.InferenceSession``
        max_sessions: in external mode, how many inner sessions are kept (the base counts); without meaning in others
        allow_other_base: take adapters that say that they were made for another base
        max_loras: most different adapters in one batch, and how many the bank keeps side by side
        max_lora_rank: refuse adapters of a higher rank; ``None`` takes any, since ranks are told by the adapters
        max_cpu_loras: most adapters in memory, those beyond lie in memory-mapped files, the least recently used first;
            ``None`` keeps all in memory
        max_cpu_bytes: the same in bytes
        max_bank_bytes: most bytes of the bank, which holds second copies of the adapters of mixed batches; runs that
            need more wait for others to end
        adapter_dtype: element type of the ports that are put in in memory: ``"float16"``, ``"bfloat16"`` or ``"int8"``
            beside float32 activations move fewer bytes; ``None`` is that of the activations
        kernels: ``"auto"`` uses the compiled kernels where they are installed (``adapterx env`` tells), ``"require"``
            refuses to run without, ``"off"`` runs standard operators. The library is registered with
            ``session_options``, which are otherwise never changed.

    Raises:
        ModelError: no model, one without ports and no adapters, or with an adapter inside, unsafe external data, or
            ONNX Runtime cannot load it.
        OptionError: a name, provider or option that does not exist.
        MismatchError: an adapter that does not belong to this model.
        FormatError: an adapter file that is broken.
        MissingDependency: ONNX Runtime is not installed, or the kernels that ``"require"`` asks for.

    Example::

        session = AdapterSession("out/model.onnx", adapters={"fr": "fr.safetensors"})
        session.run(None, feeds)                # the base model
        session.run(None, feeds, adapter="fr")  # the base with one adapter
        session.run(None, feeds, adapters=["fr", None, {"fr": 0.7, "de": 0.3}])  # one entry a row of the batch
    """

    def __init__(  # noqa: PLR0913 - the options of the contract, all by name
        self,
        model: ModelLike,
        adapters: Mapping[str, AdapterLike] | None = None,
        *,
        providers: Sequence[Provider] | None = None,
        session_options: ort.SessionOptions | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        max_sessions: int = 4,
        allow_other_base: bool = False,
        max_loras: int = 32,
        max_lora_rank: int | None = None,
        max_cpu_loras: int | None = None,
        max_cpu_bytes: int | None = None,
        max_bank_bytes: int | None = None,
        adapter_dtype: AdapterDtype | None = None,
        kernels: KernelMode = "auto",
    ) -> None:
        host = Host(providers, provider_options, session_options)
        given = {name: _read(name, adapter) for name, adapter in (adapters or {}).items()}
        folder = entry(session_options, FOLDER_OPTION)
        source = read_source(model, folder=folder, adapters=list(given.values()), adapter_dtype=adapter_dtype)
        self._manifest, self._allow_other_base = source.manifest, allow_other_base
        self._bases = BaseTensors(source.graph, source.folder, source.where) if source.manifest.bases else None
        self._model = _runnable(source, host, max_sessions, kernels)
        self._base = self._model.resident(None, 0)
        opened = self._model.session(self._base)
        self._signature = Signature.of(opened, port_names(source.manifest))
        self._providers: tuple[str, ...] = tuple(opened.get_providers())
        self._max_rank = max_lora_rank
        self._residents = Residents(self._model, max_loras=max_cpu_loras, max_bytes=max_cpu_bytes)
        self._bank = _bank(self._model, source.manifest, max_loras, max_bank_bytes)
        for name, whole in given.items():
            self.load_adapter(name, whole)

    def run(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, Any],
        run_options: ort.RunOptions | None = None,
        *,
        adapter: str | None = None,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> list[Any]:
        """Run the model: as the base, with one adapter for the whole batch, or with adapters of its own for each row.

        Nothing of a call is left for the next. What a name means is looked up once, at the beginning.

        Args:
            output_names: outputs to compute; ``None`` for all
            feeds: input name -> array or ``OrtValue``
            run_options: passed on to ONNX Runtime
            adapter: a loaded name; ``None`` is the base
            adapters: per row of the batch a loaded name, ``None`` for the base, or ``{name: weight}`` for a weighted
                sum of several (each row computes ``base + sum(weight * change)``)

        Returns:
            One array an output, in the order of ``output_names``.

        Raises:
            UnknownAdapter: no adapter of that name; nothing is run then, for any row.
            FeedError: feeds or output names that do not fit the model, a model that has no base without an adapter, or
                another number of rows than of entries in ``adapters``.
            ModelError: rows with different adapters, where the model cannot tell them apart (``docs/ops.md``).
            OptionError: ``adapter`` and ``adapters`` together, entries that are neither, or more adapters at once than
                ``max_loras`` or ``max_bank_bytes`` allow.
        """
        if adapters is not None:
            if adapter is not None:
                raise OptionError("give adapter= for the whole batch or adapters= for its rows, not both")
            return self._run_rows(output_names, feeds, run_options, adapters)
        resident = self._resident(adapter)
        outputs, checked = self._signature.checked_outputs(output_names), self._signature.checked_feeds(feeds)
        return self._results(resident, outputs, {**checked, **resident.tensors}, run_options)

    def _run_rows(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, Any],
        run_options: ort.RunOptions | None,
        adapters: Sequence[RowAdapter],
    ) -> list[Any]:
        rows = Rows.of(adapters, self._residents.held)
        outputs, checked = self._signature.checked_outputs(output_names), self._signature.checked_feeds(feeds)
        rows.check_batch(checked, self._manifest.batch)
        check_mixable(rows, self._manifest)
        if not rows.residents:
            resident = self._resident(None)
            return self._results(resident, outputs, {**checked, **resident.tensors}, run_options)
        self._residents.used(rows.residents)
        with mixed_feeds(rows, self._manifest, self._bank) as fed:
            return self._results(rows.residents[0], outputs, {**checked, **fed}, run_options)

    def _results(
        self, resident: Resident, outputs: list[str], feeds: Mapping[str, Any], run_options: ort.RunOptions | None
    ) -> list[Any]:
        results: list[Any] = self._model.session(resident).run(outputs, feeds, run_options)
        return results

    def bind(self, adapter: str | None = None) -> Bound:
        """The session with ``adapter``'s tensors bound once, for many runs in one thread.

        Raises:
            UnknownAdapter: no adapter of that name.
        """
        return Bound(self._model, self._signature, self._resident, adapter)

    def load_adapter(self, name: str, adapter: AdapterLike) -> None:
        """Make an adapter runnable under ``name``; one that has the name is replaced.

        Runs that have begun finish with the adapter that they began with. When this raises, nothing has changed.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``, at most 64, the first a letter or digit
            adapter: an ``Adapter``, or the path of a file or PEFT folder

        Raises:
            OptionError: not such a name.
            FormatError: a file that is broken, or no adapter.
            MismatchError: an adapter that does not belong to this model.
        """
        whole = _read(name, adapter)
        fitting = fit(whole, self._manifest, name=name, allow_other_base=self._allow_other_base, bases=self._bases)
        if self._max_rank is not None and max(fitting.ranks) > self._max_rank:
            raise MismatchError(
                f"adapter {name!r} has rank {max(fitting.ranks)}, and this session takes {self._max_rank} at most "
                "(max_lora_rank)"
            )
        self._residents.load(name, fitting)

    def unload_adapter(self, name: str) -> None:
        """Forget the name. The memory is freed when the last run and the last bound object let go of it.

        Raises:
            UnknownAdapter: no adapter of that name.
        """
        self._residents.unload(name)

    def identity(self, name: str) -> Identity:
        """Content hash and generation of a loaded adapter: the key for whatever is cached of its results.

        A name is no key, for it can be given again. The first call hashes the adapter's bytes.

        Raises:
            UnknownAdapter: no adapter of that name.
        """
        return self._residents.find(name).identity

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """What is loaded at this moment, in the order of loading: the adapters as they were fitted. Read-only."""
        held = self._residents.held
        return MappingProxyType({name: kept.adapter for name, kept in held.items() if kept.adapter is not None})

    @property
    def sites(self) -> SiteTable:
        """The places where adapters act."""
        return self._manifest.sites

    @property
    def manifest(self) -> Manifest:
        """What the model says of its ports."""
        return self._manifest

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, in order."""
        return list(self._providers)

    @property
    def kernels(self) -> Kernels | None:
        """The compiled kernels in use, ``None`` where standard operators do their work."""
        return self._model.kernels

    def get_inputs(self) -> list[TensorInfo]:
        """What :meth:`run` must be fed: the model's inputs without the adapter ports."""
        return list(self._signature.inputs.values())

    def get_outputs(self) -> list[TensorInfo]:
        """What the model gives."""
        return list(self._signature.outputs.values())

    def _resident(self, name: str | None) -> Resident:
        if name is None:
            if self._manifest.required:
                lost = ", ".join(self._manifest.required)
                raise FeedError(
                    f"the model has no base to run: {lost} came with the exported adapter, whole. Name an adapter that "
                    f"has them; loaded: {shown(self._residents.held)}"
                )
            return self._base
        found = self._residents.find(name)
        self._residents.used([found])
        return found


def _read(name: str, adapter: AdapterLike) -> Adapter:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(
            f"{name!r} cannot name an adapter: take 1 to 64 of letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return adapter if isinstance(adapter, Adapter) else read_adapter(adapter)


def _runnable(source: ModelSource, host: Host, max_sessions: int, kernels: KernelMode) -> Runnable:
    if source.manifest.port == "external":
        return BakedModels(source, host, limit=max_sessions, kernels=kernels)
    return FedModel(source, host, kernels=kernels)


def _bank(model: Runnable, manifest: Manifest, max_loras: int, max_bytes: int | None) -> AdapterBank | None:
    """Where adapters can lie side by side; ``None`` where only one fits."""
    if not isinstance(model, FedModel) or not manifest.dynamic_rank:
        return None
    return AdapterBank(
        manifest, max_loras=max_loras, max_bytes=max_bytes, device=model.device, exact=model.kernels is not None
    )
