"""Checkpoints and converted models: state, manifest, pickles and shards, mostly with an updated manifest."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

from tools.fuzz.case import Work
from tools.fuzz.values import change_bytes, change_tree, change_value, hostile

EVIL = b"cos\nsystem\n(S'touch executed'\ntR."


def make(work: Work) -> None:
    """Resume from a changed checkpoint, or convert it, or convert a changed converted model back."""
    work.copy("config.yaml", "problems.jsonl", "test.jsonl", "model")
    kind = work.random.random()
    resumes = kind < 0.65
    if kind < 0.85:
        folder = Path("runs/run/checkpoints/step_00000001")
        work.copy("runs/run")
        other = work.folder / "runs/run/checkpoints/step_00000002"
        if work.random.random() < 0.8:
            _remove(other)
        else:
            folder = folder.with_name(other.name)
        work.arguments = ["train", "config.yaml", *_overrides(work.random)]
    else:
        folder = Path("converted")
        work.copy("converted")
    if not resumes:
        work.arguments = ["convert", "megatron-to-hf", str(folder), "out"]
    renewed = work.random.random() < 0.85
    for random in work.changes():
        random.choices(_CHANGES, weights=_WEIGHTS)[0](work, folder, random)
    if renewed and (work.folder / folder).is_dir():
        _renew(work.folder / folder)


def _overrides(random: Random) -> list[str]:
    evaluation = ["evaluation.source=test.jsonl", "evaluation.prompts=2", "evaluation.responses_per_prompt=2"]
    settings = ((), (), ("checkpoint.on_corruption=previous",), ("checkpoint.load_optimizer=false",))
    return ["trainer.steps=2", *(evaluation if random.random() < 0.5 else []), *random.choice(settings)]


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _renew(folder: Path) -> None:
    """Write a manifest of the changed files, unless the manifest itself was changed."""
    from megatron_g2rl.config.run_files import MANIFEST
    from megatron_g2rl.policy.checkpoint import manifest

    if (folder / MANIFEST).is_file() and not (folder / "manifest_changed").exists():
        try:
            files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
            manifest.write(folder, manifest.checksums(folder, [str(p.relative_to(folder)) for p in files]))
        except OSError:
            pass
    (folder / "manifest_changed").unlink(missing_ok=True)


def _change_state(work: Work, folder: Path, random: Random) -> None:
    name = "trainer.json" if (work.folder / folder / "trainer.json").is_file() else "conversion.json"
    if (work.folder / folder / name).is_file():
        work.change_json(str(folder / name), random)


def _change_manifest(work: Work, folder: Path, random: Random) -> None:
    if (work.folder / folder / "manifest.json").is_file():
        work.change_json(str(folder / "manifest.json"), random)
        (work.folder / folder / "manifest_changed").touch()


def _change_form(work: Work, folder: Path, random: Random) -> None:
    if (work.folder / folder / "megatron" / "metadata.json").is_file():
        work.change_json(str(folder / "megatron" / "metadata.json"), random)


def _change_side_file(work: Work, folder: Path, random: Random) -> None:
    names = [p.name for p in sorted((work.folder / folder).iterdir()) if p.suffix == ".json" and p.is_file()]
    if names:
        work.change_json(str(folder / random.choice(names)), random)


def _change_common(work: Work, folder: Path, random: Random) -> None:
    """Change the content of common.pt, mostly to something that torch.save can write."""
    import torch

    file = work.folder / folder / "megatron" / "common.pt"
    if not file.is_file() or file.is_symlink():
        return
    kind = random.random()
    if kind < 0.15:
        file.write_bytes(change_bytes(file.read_bytes(), random))
    elif kind < 0.3:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", random.choice((EVIL, b"", pickle.dumps(1), b"\x80\x02.")))
            archive.writestr("archive/version", b"3")
        file.write_bytes(random.choice((stream.getvalue(), EVIL + stream.getvalue(), stream.getvalue() + EVIL)))
    else:
        try:
            tree = torch.load(file, weights_only=True)
        except Exception:  # an earlier change made it unreadable
            tree = {}
        torch.save(_change_object(tree, random), file)


def _change_object(tree: Any, random: Random) -> Any:
    """Change a value in nested containers that may contain tensors."""
    import torch

    if isinstance(tree, dict) and tree and random.random() < 0.85:
        name = random.choice(sorted(tree, key=str))
        changed = dict(tree)
        if random.random() < 0.15:
            del changed[name]
        else:
            changed[name] = _change_object(tree[name], random)
        return changed
    if isinstance(tree, torch.Tensor):
        return random.choice((tree.double(), tree.reshape(-1)[:-1], torch.full_like(tree, -1), 0, tree[None]))
    return change_value(tree, random) if random.random() < 0.8 else hostile(random)


def _change_index(work: Work, folder: Path, random: Random) -> None:
    """Change `.metadata`: fields of the index, or bytes."""
    from megatron_g2rl.policy.checkpoint.safe_pickle import read_metadata

    file = work.folder / folder / "megatron" / ".metadata"
    if not file.is_file() or file.is_symlink():
        return
    data = file.read_bytes()
    if random.random() < 0.3:
        file.write_bytes(random.choice((change_bytes(data, random), EVIL, pickle.dumps({"a": 1}), pickle.dumps([]))))
        return
    try:
        index = read_metadata(file.parent)  # not pickle.loads: an earlier change may have made it hostile
        _change_entries(index, random)
        file.write_bytes(pickle.dumps(index))
    except Exception:  # an earlier change made it unreadable
        file.write_bytes(change_bytes(data, random))


def _change_entries(index: Any, random: Random) -> None:
    import torch

    kind = random.randrange(8)
    name = random.choice(sorted(index.state_dict_metadata))
    tensor = index.state_dict_metadata[name]
    entry = index.storage_data[random.choice(sorted(index.storage_data, key=str))]
    if kind == 0:
        del index.state_dict_metadata[name]
    elif kind == 1:
        entry.offset = random.choice((-1, 0, 2**40, entry.offset + 1, 2**70, None, "x"))
    elif kind == 2:
        entry.length = random.choice((-1, 0, 2**40, entry.length - 1, 2**70, None, "x"))
    elif kind == 3:
        entry.relative_path = random.choice(
            ("../x", "/dev/zero", "", ".", "common.pt", "__9_9.distcp", None, "a\0b", 7)
        )
    elif kind == 4 and hasattr(tensor, "size"):
        tensor.size = torch.Size(random.choice(((0,), (2**40,), (1, 1), (), tuple(tensor.size)[::-1])))
    elif kind == 5 and hasattr(tensor, "properties"):
        tensor.properties.dtype = random.choice((torch.float64, torch.int8, torch.bool, None, "float32"))
    elif kind == 6 and hasattr(tensor, "chunks"):
        tensor.chunks = random.choice(([], tensor.chunks * 2, None, tensor.chunks[:1]))
    else:
        index.storage_data = random.choice(({}, None, [], {"x": entry}))


def _change_shard(work: Work, folder: Path, random: Random) -> None:
    files = [p for p in sorted((work.folder / folder).rglob("*.distcp")) if p.is_file() and not p.is_symlink()]
    if files:
        file = random.choice(files)
        file.write_bytes(change_bytes(file.read_bytes(), random))


def _replace(work: Work, folder: Path, random: Random) -> None:
    names = [str(p.relative_to(work.folder)) for p in sorted((work.folder / folder).rglob("*"))]
    if names:
        work.replace_file(random.choice(names), random)


def _rename(work: Work, folder: Path, random: Random) -> None:
    """Add another folder, with a name that is nearly that of a checkpoint."""
    parent = (work.folder / folder).parent
    name = random.choice(("step_99999999", "step_00000003", "step_1", "step_٠٠٠٠٠٠٠٣", "step_00000005.x"))
    (parent / name).mkdir(exist_ok=True)
    if random.random() < 0.7:
        text = json.dumps(change_tree({"version": 1, "files": {}}, random)) if random.random() < 0.7 else "{"
        (parent / name / "manifest.json").write_text(text)


_CHANGES = (_change_state, _change_manifest, _change_form, _change_side_file, _change_common, _change_index,
            _change_shard, _replace, _rename)  # fmt: skip
_WEIGHTS = (22, 8, 6, 12, 18, 18, 8, 8, 3)
