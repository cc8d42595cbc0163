"""Both frameworks side by side on a page: python scripts/demo_page.py --weights RUN"""

from gpt2_commands.page import main
from gpt2_core.cli import run

if __name__ == "__main__":
    run(lambda arguments: main(arguments, "demo_page.py"))
