import subprocess
import sys

import fastmim.data


def test_every_public_name_is_there():
    for name in fastmim.data.__all__:
        assert getattr(fastmim.data, name) is not None
    assert callable(fastmim.data.normalise)


def test_settings_are_read_without_torch_pillow_or_scikit_learn():
    """`--help` waits for none of them."""
    script = (
        "import sys; import fastmim.data; fastmim.data.DataConfig();"
        "print([name for name in ('torch', 'PIL', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_workers_need_no_torch():
    script = (
        "import sys; import fastmim.data.workers, fastmim.data.folder, fastmim.data.digits;"
        "print([name for name in ('torch', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
