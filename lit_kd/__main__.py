"""``python -m lit_kd`` is ``lit-kd``."""

from lit_kd.cli.main import main

if __name__ == "__main__":
    main()
