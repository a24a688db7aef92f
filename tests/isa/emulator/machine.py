"""A Bochs CPU in 64-bit user mode, set to run one program under the kernel of ``syscalls.py``."""

import signal
import sys
from types import ModuleType

from elf import Program
from memory import EXECUTE, PAGE, READ, WRITE, Memory
from syscalls import Exit, Kernel

# The kernel's only code, entered by SYSCALL. WBINVD is where our hook runs; then CR3 is reloaded, because the
# call may have changed the page tables; then back to ring 3.
_KERNEL_CODE_AT = 0xFFFF_8000_0000_0000
_SCRATCH_AT = _KERNEL_CODE_AT + PAGE
_SCRATCH = _SCRATCH_AT.to_bytes(8, "little")
_KERNEL_CODE = b"".join(
    (
        b"\x0f\x09",  # wbinvd
        b"\x48\xa3" + _SCRATCH,  # mov [scratch], rax
        b"\x0f\x20\xd8",  # mov rax, cr3
        b"\x0f\x22\xd8",  # mov cr3, rax
        b"\x48\xa1" + _SCRATCH,  # mov rax, [scratch]
        b"\x48\x0f\x07",  # sysretq
    )
)

# What the kernel makes of a CPU exception; SIGSEGV for the rest.
_SIGNALS = {
    0: signal.SIGFPE,
    1: signal.SIGTRAP,
    3: signal.SIGTRAP,
    6: signal.SIGILL,
    16: signal.SIGFPE,
    19: signal.SIGFPE,
}


class Machine:
    def __init__(self, bochscpu: ModuleType, xcr0: int):
        self._bochs = bochscpu
        self._xcr0 = xcr0
        self._status: int | None = None
        self._failure: BaseException | None = None
        self.memory = Memory(bochscpu)
        self.memory.map(_KERNEL_CODE_AT, PAGE, READ | EXECUTE)
        self.memory.map(_SCRATCH_AT, PAGE, READ | WRITE)
        self.memory.write(_KERNEL_CODE_AT, _KERNEL_CODE)

    def run(self, program: Program) -> int:
        """Exit status as a shell would report it: 128 + signal if the program died of one."""
        session = self._bochs.Session()
        session.missing_page_handler = self._guard(session, self.memory.touch)
        session.cpu.state = self._initial_state(program)
        self._kernel = Kernel(self.memory, program.end, lambda base: _set_fs_base(session.cpu, base))
        hook = self._bochs.Hook()
        hook.cache_cntrl = self._guard(session, self._on_syscall)
        hook.exception = self._guard(session, self._on_exception)
        session.run([hook])
        if self._failure:
            raise self._failure
        assert self._status is not None, "the CPU stopped by itself"
        return self._status

    def _guard(self, session, callback):
        """An exception must not pass through Bochs: keep it, and stop."""

        def guarded(*arguments):
            try:
                callback(*arguments)
            except Exit as exit:
                self._status = exit.status
                session.stop()
            except BaseException as error:
                self._failure = error
                session.stop()

        return guarded

    def _on_syscall(self, session, *_) -> None:
        cpu = session.cpu
        arguments = (cpu.rdi, cpu.rsi, cpu.rdx, cpu.r10, cpu.r8, cpu.r9)
        cpu.rax = self._kernel.call(cpu.rax, arguments)

    def _on_exception(self, session, _, vector: int, error_code: int) -> None:
        if self._status is not None:
            return
        cpu = session.cpu
        killed_by = _SIGNALS.get(vector, signal.SIGSEGV)
        print(
            f"emulator: {killed_by.name} (exception {vector}, error code {error_code:#x}) near rip "
            f"{cpu.rip:#x} ({self._instruction_bytes(cpu.rip)}), last page fault at {cpu.cr2:#x}",
            file=sys.stderr,
        )
        raise Exit(128 + killed_by)

    def _instruction_bytes(self, address: int) -> str:
        length = 12 if self.memory.is_mapped(address + 11) else PAGE - address % PAGE
        return self.memory.read(address, length).hex(" ") if self.memory.is_mapped(address) else "not mapped"

    def _initial_state(self, program: Program):
        state = self._bochs.State()
        state.cr0 = 0x8005_0033  # paging, write-protect, numeric errors, protected mode
        state.cr3 = self.memory.root
        state.cr4 = 0x5_0620  # FSGSBASE, OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
        state.efer = 0xD01  # NX, long mode active and enabled, SYSCALL
        state.xcr0 = self._xcr0
        state.mxcsr, state.mxcsr_mask = 0x1F80, 0xFFFF
        state.fpcw, state.fptw = 0x37F, 0xFFFF
        state.star = 0x23 << 48 | 0x10 << 32  # selectors for SYSRET and SYSCALL
        state.lstar = _KERNEL_CODE_AT
        state.sfmask = 0x200  # interrupts off in the kernel
        state.rflags = 0x202
        state.rip, state.rsp = program.entry, program.stack_pointer
        state.cs = self._segment(0x33, 0xAFFB)
        for name in ("ss", "ds", "es", "fs", "gs"):
            setattr(state, name, self._segment(0x2B, 0xCFF3))
        no_table = self._bochs.GlobalSegment()
        no_table.base = no_table.limit = 0
        state.gdtr = state.idtr = no_table
        return state

    def _segment(self, selector: int, attributes: int):
        segment = self._bochs.Segment()
        segment.present, segment.selector, segment.attr = True, selector, attributes
        segment.base, segment.limit = 0, 0xFFFF_FFFF
        return segment


def _set_fs_base(cpu, base: int) -> None:
    segment = cpu.fs
    segment.base = base
    cpu.fs = segment
