"""Whether a model directory works: it is loaded by the class that its configuration names, nothing is missing, and a
forward pass on made-up inputs gives finite numbers."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import torch

from kt_hf.errors import IntegrityError
from kt_hf.merging import config
from kt_hf.tensor_files import weight_files

logger = logging.getLogger(__name__)

TOKENS = 8
"""Length of the made-up text."""


def try_out(folder: Path) -> None:
    """Load a model and ask it something. Raises `IntegrityError` where it does not answer with numbers; says so where
    it cannot be tried: an unknown class, inputs that cannot be made up, too little memory."""
    size = sum(path.stat().st_size for path in weight_files(folder))
    if size * 2 > _free():
        logger.warning("the result was not loaded to try it: %.3g GB, and %.3g are free", size / 1e9, _free() / 1e9)
        return
    cls = _class(config(folder))
    if cls is None:
        logger.warning("the result was not tried: transformers has no class for it")
        return
    try:
        model, said = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
    except Exception as error:  # whatever transformers says to weights or a configuration that it cannot use
        told = " ".join(str(error).split())[:300]
        raise IntegrityError(
            f"the merged model cannot be loaded: {told}",
            "look at the parents' files; --no-check writes it all the same",
        ) from error
    if missing := sorted(said["missing_keys"]):
        raise IntegrityError(
            f"the merged model lacks {', '.join(missing[:4])} of {cls.__name__}", "look at the parents' files"
        )
    model.eval()
    try:
        given = inputs(model)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("the result was loaded, but not asked anything: no inputs for %s (%s)", cls.__name__, error)
        return
    with torch.no_grad():
        try:
            found = model(**given)
        except Exception as error:  # whatever a model's code says to inputs that it does not expect
            logger.warning("the result was loaded, but not asked anything: %s", str(error).splitlines()[:1])
            return
    if bad := [name for name, t in _tensors(found) if not bool(t.isfinite().all())]:
        raise IntegrityError(
            f"the merged model's {', '.join(bad[:3])} are not finite",
            "merge in another way, or the parents' own outputs are not finite either",
        )


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """One made-up example of what the model's forward pass takes."""
    settings = model.config
    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    dtype = next(model.parameters()).dtype
    found: dict[str, torch.Tensor] = {}
    words = getattr(settings, "text_config", settings)
    if "input_ids" in takes and (main == "input_ids" or "pixel_values" in takes):
        found["input_ids"] = torch.arange(TOKENS)[None] % words.vocab_size
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = torch.zeros(1, 2, dtype=torch.long)
    if "pixel_values" in takes:
        seen = getattr(settings, "vision_config", settings)
        side = seen.image_size
        high, wide = (side, side) if isinstance(side, int) else side
        found["pixel_values"] = (
            torch.linspace(-1, 1, seen.num_channels * high * wide).reshape(1, -1, high, wide).to(dtype)
        )
    if main == "input_values" and "pixel_values" not in takes:
        found["input_values"] = torch.linspace(-1, 1, 16000)[None].to(dtype)
    if main not in found:
        raise ValueError(f"it takes {main}")
    return found


def _class(settings: dict[str, Any]) -> Any:
    import transformers

    for name in settings.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _tensors(found: Any) -> list[tuple[str, torch.Tensor]]:
    """A forward pass's floating point numbers, by name."""
    items = found.items() if hasattr(found, "items") else []
    return [(name, t) for name, t in items if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _free() -> int:
    """Bytes of memory that are free, or may be made so."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
