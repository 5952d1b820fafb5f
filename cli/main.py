"""`minisgl`: the command line. Commands import torch only when they run, so that help is immediate."""

import sys

import click

import minisgl
from minisgl.cli.bench import bench
from minisgl.cli.chat import chat
from minisgl.cli.eval import evaluate
from minisgl.cli.info import info
from minisgl.cli.merge import merge
from minisgl.cli.messages import lossy
from minisgl.cli.run import run
from minisgl.cli.serve import serve

EXAMPLES = """\b
Examples:
  minisgl run prompts.jsonl                      answer a file with the demo model
  minisgl run prompts.jsonl -m path/to/model     with a Hugging Face checkpoint
  minisgl run --help                             rows, flags and more examples
  minisgl serve -m path/to/model                 answer requests over HTTP, as OpenAI's API does
  minisgl chat                                   talk to the demo model
  minisgl eval demo                              score the demo model on its own tasks
  minisgl info                                   versions, devices and kernel path
"""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(minisgl.__version__, prog_name="minisgl")
def main() -> None:
    """Run large language models fast, with every kernel written in Triton."""
    sys.stderr = lossy(sys.stderr)


for command in (run, serve, chat, merge, evaluate, info, bench):
    main.add_command(command)
