"""`python -m distill_llm`, the same as `distill-llm`; `accelerate launch -m distill_llm` needs it."""

from distill_llm.cli.main import app

if __name__ == "__main__":
    app(prog_name="distill-llm")
