package guest

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The filter on a builder's system calls: as Nix's, no set-user-id and
// set-group-id bits by chmod, and no extended attributes, because neither has a
// place in a NAR. A call is refused in every way in which the machine can make
// it: natively, as a 32-bit program and, on x86-64, as an x32 one.

// A sysABI holds the numbers of one way to make system calls.
type sysABI struct {
	arch uint32 // AUDIT_ARCH_*
	mask uint32 // of the bits of the number that count; x32 sets one more
	// modes maps calls that set a mode to the index of the argument with it.
	modes []modeCall
	// xattrs are the calls that set and get extended attributes. Listing and
	// removing them is allowed by Nix.
	xattrs []uint32
}

type modeCall struct{ nr, arg uint32 }

// span returns the numbers from first to last.
func span(first, last uint32) []uint32 {
	var s []uint32
	for n := first; n <= last; n++ {
		s = append(s, n)
	}
	return s
}

// The system calls since 5.x have the same number everywhere; setxattrat and
// getxattrat are 463 and 464.
const fchmodat2 = 452

var (
	abiX8664 = sysABI{
		arch: unix.AUDIT_ARCH_X86_64, mask: ^uint32(0x40000000),
		modes:  []modeCall{{90, 1}, {91, 1}, {268, 2}, {fchmodat2, 2}},
		xattrs: append(span(188, 193), span(463, 464)...),
	}
	abiI386 = sysABI{
		arch: unix.AUDIT_ARCH_I386, mask: ^uint32(0),
		modes:  []modeCall{{15, 1}, {94, 1}, {306, 2}, {fchmodat2, 2}},
		xattrs: append(span(226, 231), span(463, 464)...),
	}
	abiAArch64 = sysABI{
		arch: unix.AUDIT_ARCH_AARCH64, mask: ^uint32(0),
		modes:  []modeCall{{52, 1}, {53, 2}, {fchmodat2, 2}},
		xattrs: append(span(5, 10), span(463, 464)...),
	}
	abiARM = sysABI{
		arch: unix.AUDIT_ARCH_ARM, mask: ^uint32(0),
		modes:  []modeCall{{15, 1}, {94, 1}, {333, 2}, {fchmodat2, 2}},
		xattrs: append(span(226, 231), span(463, 464)...),
	}
)

// nativeABIs returns the ways of a machine, by the name Go has for it.
func nativeABIs(goarch string) ([]sysABI, error) {
	switch goarch {
	case "amd64":
		return []sysABI{abiX8664, abiI386}, nil
	case "arm64":
		return []sysABI{abiAArch64, abiARM}, nil
	}
	return nil, fmt.Errorf("no system call filter for %s", goarch)
}

// Offsets in struct seccomp_data. The low half of an argument comes first, as
// all machines here are little-endian.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// setIDBits are the bits of a mode that are refused.
const setIDBits = unix.S_ISUID | unix.S_ISGID

// seccompProgram returns the filter for some ABIs. A call by any other one
// kills its thread.
func seccompProgram(abis []sysABI) []unix.SockFilter {
	var p program
	for _, abi := range abis {
		p.load(offArch)
		var body program
		body.load(offNr)
		if abi.mask != ^uint32(0) {
			body.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, abi.mask)
		}
		for _, nr := range abi.xattrs {
			body.unless(nr, errno(unix.ENOTSUP))
		}
		for _, c := range abi.modes {
			var check program
			check.load(offArgs + 8*c.arg)
			check = append(check, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: setIDBits, Jf: 1})
			check = append(check, errno(unix.EPERM)...)
			check = append(check, verdict(unix.SECCOMP_RET_ALLOW)...)
			body.unless(c.nr, check)
		}
		body = append(body, verdict(unix.SECCOMP_RET_ALLOW)...)
		p.unless(abi.arch, body)
	}
	return append(p, verdict(unix.SECCOMP_RET_KILL_THREAD)...)
}

// A program is a piece of classic BPF.
type program []unix.SockFilter

func (p *program) add(code uint16, k uint32) { *p = append(*p, unix.SockFilter{Code: code, K: k}) }

// load puts a word of seccomp_data into the accumulator.
func (p *program) load(offset uint32) { p.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }

// unless appends then, which is jumped over unless the accumulator is k. A
// conditional jump reaches 255 instructions, so it only chooses between then
// and an unconditional one.
func (p *program) unless(k uint32, then program) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: 1})
	p.add(unix.BPF_JMP|unix.BPF_JA, uint32(len(then)))
	*p = append(*p, then...)
}

// verdict ends the program.
func verdict(action uint32) program {
	return program{{Code: unix.BPF_RET | unix.BPF_K, K: action}}
}

// errno ends the program: the call fails with e.
func errno(e unix.Errno) program {
	return verdict(unix.SECCOMP_RET_ERRNO | uint32(e)&unix.SECCOMP_RET_DATA)
}

// installSeccomp filters the system calls of the calling thread, which must
// have no_new_privs, and of what it executes.
func installSeccomp() error {
	abis, err := nativeABIs(runtime.GOARCH)
	if err != nil {
		return err
	}
	filter := seccompProgram(abis)
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0)
	runtime.KeepAlive(filter)
	return err
}
