"""An argument parser that says what was probably meant: by an option, a command, or a value that is not known."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Parser"]

LINES = 6  # of a usage that is shown whole
ALIASES = {"ort": "onnxruntime", "onnx": "onnxruntime", "cpu": "onnxruntime", "trt": "tensorrt", "gpu": "torch"}


class Parser(argparse.ArgumentParser):
    """argparse's, with "did you mean"; unknown options are told by the command that was given them."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options. Ends the program with a usage and what was meant, for words that are none."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            words = sys.argv[1:] if args is None else list(args)
            command = self._command(words)
            command.error(f"unrecognized arguments: {' '.join(left)}{command._meant(left)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Ends the program with the usage and the message."""
        found = re.match(r"argument ([^:]*): invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            known = re.findall(r"[\w-]+", found[3])
            close = [ALIASES.get(found[2].lower(), "")] if ALIASES.get(found[2].lower()) in known else []
            close = close or difflib.get_close_matches(found[2], known, n=1, cutoff=0.6)
            if close:
                message += f": did you mean {close[0]}?"
            elif found[1] == "COMMAND":
                message += f". A command comes first: {self.prog} compress {found[2]} --budget 0.6"
        self.exit(2, f"{self._short_usage()}{self.prog}: error: {message}\n")

    def _short_usage(self) -> str:
        """The usage; of many options only where they are listed, because what is wrong stands after it."""
        whole = self.format_usage()
        if whole.count("\n") <= LINES:
            return whole
        words = [a.metavar or a.dest for a in self._actions if not a.option_strings]
        return f"usage: {self.prog} {' '.join(map(str, words))} [options]     (all of them: {self.prog} --help)\n"

    def _command(self, words: Sequence[str]) -> Parser:
        """The parser of the command in these words, however deep."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for i, word in enumerate(words):
                    if word in action.choices:
                        made = action.choices[word]
                        return made._command(words[i + 1 :]) if isinstance(made, Parser) else self
        return self

    def _meant(self, left: Sequence[str]) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        hints = []
        for word in left:
            name = word.split("=")[0]
            if name.startswith("-"):
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hints += [f"did you mean {close[0]}?"] if close else []
        if not hints and len(left) == 1:  # a value without its option
            if "--budget" in known and re.fullmatch(r"[\d.,]+(%|x|ms|us|s)?", left[0]):
                hints = [f"did you mean --budget {left[0]}?"]
            elif "--images" in known and Path(left[0]).is_dir():
                hints = [f"did you mean --images {left[0]}?"]
        return f": {' '.join(hints)}" if hints else ""
