package guest

import (
	"encoding/binary"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// simulate runs a filter as the kernel does. It knows what the filter uses.
func simulate(t *testing.T, prog []unix.SockFilter, data []byte) uint32 {
	t.Helper()
	var a uint32
	for pc := 0; pc < len(prog); pc++ {
		in := prog[pc]
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			if in.K%4 != 0 || int(in.K)+4 > len(data) {
				t.Fatalf("instruction %d loads from %d", pc, in.K)
			}
			a = binary.LittleEndian.Uint32(data[in.K:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= in.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(in.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			pc += jump(in, a == in.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			pc += jump(in, a&in.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		default:
			t.Fatalf("instruction %d has code %#x", pc, in.Code)
		}
	}
	t.Fatal("the program does not return")
	return 0
}

func jump(in unix.SockFilter, yes bool) int {
	if yes {
		return int(in.Jt)
	}
	return int(in.Jf)
}

// call returns the seccomp_data of a system call.
func call(arch, nr uint32, args ...uint64) []byte {
	b := make([]byte, 64)
	binary.LittleEndian.PutUint32(b[offNr:], nr)
	binary.LittleEndian.PutUint32(b[offArch:], arch)
	for i, arg := range args {
		binary.LittleEndian.PutUint64(b[offArgs+8*i:], arg)
	}
	return b
}

const (
	allow  = uint32(unix.SECCOMP_RET_ALLOW)
	eperm  = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPERM)
	enosup = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EOPNOTSUPP)
	kill   = uint32(unix.SECCOMP_RET_KILL_THREAD)
)

// kernelTables has the numbers of the calls by which a mode can be set, from the
// kernel's tables (arch/*/entry/syscalls, asm-generic/unistd.h), and the number
// of the first call about extended attributes.
var kernelTables = []struct {
	name   string
	arch   uint32
	x32    uint32 // bit in all numbers
	chmod  uint32 // 0: no such call
	fchmod uint32
	at     uint32 // fchmodat
	xattr  uint32 // setxattr; lsetxattr … fremovexattr follow
	others []uint32
}{
	{"x86_64", unix.AUDIT_ARCH_X86_64, 0, 90, 91, 268, 188, []uint32{0, 59, 197, 198, 257, 451, 453, 466, 512}},
	{"x32", unix.AUDIT_ARCH_X86_64, 0x40000000, 90, 91, 268, 188, []uint32{0, 257, 520}},
	{"i386", unix.AUDIT_ARCH_I386, 0, 15, 94, 306, 226, []uint32{0, 11, 90, 91, 188, 235, 268, 466}},
	{"aarch64", unix.AUDIT_ARCH_AARCH64, 0, 0, 52, 53, 5, []uint32{14, 15, 54, 90, 221}},
	{"arm", unix.AUDIT_ARCH_ARM, 0, 15, 94, 333, 226, []uint32{0, 235, 306}},
}

func programFor(t *testing.T, arch uint32) []unix.SockFilter {
	t.Helper()
	goarch := "amd64"
	if arch == unix.AUDIT_ARCH_AARCH64 || arch == unix.AUDIT_ARCH_ARM {
		goarch = "arm64"
	}
	abis, err := nativeABIs(goarch)
	if err != nil {
		t.Fatal(err)
	}
	return seccompProgram(abis)
}

func TestSeccompProgram(t *testing.T) {
	for _, k := range kernelTables {
		t.Run(k.name, func(t *testing.T) {
			prog := programFor(t, k.arch)
			check := func(want, nr uint32, args ...uint64) {
				t.Helper()
				if got := simulate(t, prog, call(k.arch, nr|k.x32, args...)); got != want {
					t.Errorf("call %d %o is %#x, want %#x", nr, args, got, want)
				}
			}
			for _, mode := range []uint64{0o4755, 0o2755, 0o6000, 0o104644, 0o7777, 1<<32 | 0o4000} {
				if k.chmod != 0 {
					check(eperm, k.chmod, 0, mode)
				}
				check(eperm, k.fchmod, 0, mode)
				check(eperm, k.at, 0, 0, mode)
				check(eperm, 452, 0, 0, mode)
			}
			for _, mode := range []uint64{0, 0o755, 0o1777, 0o100644, 1 << 32} {
				if k.chmod != 0 {
					check(allow, k.chmod, 0o6000, mode)
				}
				check(allow, k.fchmod, 0o6000, mode)
				check(allow, k.at, 0o6000, 0o6000, mode, 0o6000)
				check(allow, 452, 0o6000, 0o6000, mode, 0o6000)
			}
			for nr := range uint32(6) { // set and get
				check(enosup, k.xattr+nr)
			}
			for nr := uint32(6); nr < 12; nr++ { // list and remove
				check(allow, k.xattr+nr)
			}
			check(enosup, 463)
			check(enosup, 464)
			check(allow, 465)
			for _, nr := range k.others {
				check(allow, nr, 0o6000, 0o6000, 0o6000, 0o6000, 0o6000, 0o6000)
			}
		})
	}
}

func TestSeccompProgramKillsOtherABIs(t *testing.T) {
	for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_AARCH64} {
		prog := programFor(t, arch)
		for _, other := range []uint32{unix.AUDIT_ARCH_MIPS, unix.AUDIT_ARCH_RISCV64, 0} {
			if got := simulate(t, prog, call(other, 90, 0, 0o755)); got != kill {
				t.Errorf("arch %#x in the filter for %#x: %#x", other, arch, got)
			}
		}
	}
	if _, err := nativeABIs("mips"); err == nil {
		t.Error("no error for a machine without a filter")
	}
}

// TestSeccompProgramIsWellFormed checks what the kernel checks: every jump
// stays inside, and the last instruction returns.
func TestSeccompProgramIsWellFormed(t *testing.T) {
	for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_AARCH64} {
		prog := programFor(t, arch)
		if len(prog) > unix.BPF_MAXINSNS {
			t.Fatalf("%d instructions", len(prog))
		}
		for pc, in := range prog {
			var to []int
			switch in.Code & 7 {
			case unix.BPF_JMP:
				to = []int{int(in.Jt), int(in.Jf)}
				if in.Code == unix.BPF_JMP|unix.BPF_JA {
					to = []int{int(in.K)}
				}
			}
			if slices.ContainsFunc(to, func(n int) bool { return pc+1+n >= len(prog) }) {
				t.Errorf("instruction %d jumps out", pc)
			}
		}
		if prog[len(prog)-1].Code != unix.BPF_RET|unix.BPF_K {
			t.Error("the last instruction does not return")
		}
	}
	if runtime.GOARCH == "amd64" {
		// The native numbers are those of this machine's headers.
		if unix.SYS_FCHMODAT2 != 452 || unix.SYS_FSETXATTR != 190 || unix.SYS_FGETXATTR != 193 || unix.SYS_FCHMODAT != 268 {
			t.Error("numbers differ from x/sys/unix")
		}
	}
}
