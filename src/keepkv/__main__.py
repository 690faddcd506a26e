"""``python -m keepkv`` is the command ``keepkv``."""

from keepkv.cli.main import app

if __name__ == "__main__":
    app()
