"""The command of lm-evaluation-harness with the model gpt2_jax: python -m gpt2_evaluate --model gpt2_jax ...

The harness finds models by a table of its own, and asks no other package for more.
"""

import sys

from gpt2_core.errors import UserError, report


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import gpt2_evaluate.harness  # noqa: F401  registers the model
    except ImportError as error:
        missing = UserError(f"lm-evaluation-harness can't be imported ({error}): pip install 'gpt2-jax[evaluate]'")
        sys.exit(report(missing))
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(report(error))


if __name__ == "__main__":
    main()
