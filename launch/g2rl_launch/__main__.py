"""`g2rl launch|sweep|status|logs|cancel` in the launch environment: `PYTHON launch/g2rl_launch/__main__.py ARGUMENTS`.

With `--link`, makes both packages importable in that environment for other programs, too.

Loads both packages from their folders without adding the parent folders to the path: in an installed wheel those also
contain torch and other packages that nemo-run must not find.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def load(name: str, folder: Path) -> None:
    """Import the package in `folder` under `name`, independent of sys.path."""
    file = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def main() -> None:
    """Run the command of sys.argv."""
    # Else `import profile` would find ours.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != FOLDER]
    load("g2rl_launch", FOLDER)
    candidates = [folder / "megatron_g2rl" for folder in FOLDER.parents[:2]]  # in a wheel, in a checkout
    load("megatron_g2rl", next(folder for folder in candidates if folder.is_dir()))
    if sys.argv[1:] == ["--link"]:
        from g2rl_launch.install import link

        link(Path(sysconfig.get_path("purelib")))
        return
    try:
        from g2rl_launch.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"{sys.executable} lacks {error.name}: `g2rl launch --install` creates a complete launch environment")
    app(prog_name="g2rl")


if __name__ == "__main__":
    main()
