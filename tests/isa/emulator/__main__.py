"""Runs a static x86-64 Linux program on an emulated CPU: ``python tests/isa/emulator --cpu skx PROGRAM ...``

For programs of tests: one thread, some thirty system calls, no files. The exit status is the program's, or
128 + the signal that it would have died of (139: touched memory that it does not own; 132: an instruction
that the chosen CPU does not have). 125: the emulator itself failed. 12-30 million instructions a second.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import bochs
import elf
from machine import Machine


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulator", description=__doc__.split(":", 1)[0] + ".")
    parser.add_argument("--cpu", choices=bochs.MODELS, default="spr", help="CPU model (default: spr)")
    parser.add_argument(
        "--xcr0",
        type=lambda text: int(text, 0),
        help="register state that the kernel enables; 0x7 is one that knows AVX only",
    )
    parser.add_argument("--check", action="store_true", help="only say (by the exit status) if Bochs loads")
    parser.add_argument("program", type=Path, nargs="?")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    model = bochs.MODELS[args.cpu]
    if args.xcr0 is not None:
        model = replace(model, xcr0=args.xcr0)
    try:
        machine = Machine(bochs.load(model), model.xcr0)
        if args.check:
            return 0
        if args.program is None:
            parser.error("PROGRAM is missing")
        environment = {k: v for k, v in os.environ.items() if k.startswith(("MPREC_", "OMP_"))}
        program = elf.load(machine.memory, args.program, [str(args.program), *args.arguments], environment)
        return machine.run(program)
    except (ImportError, OSError, ValueError) as error:
        print(f"emulator: {error}", file=sys.stderr)
        return 125


status = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # Bochs's own global destructors are not made for the end of a process
