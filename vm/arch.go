package vm

import (
	"debug/elf"
	"fmt"
	"runtime"
	"slices"
	"strings"
)

// An arch is what guests of one processor architecture have that others have
// not. There is one value for each; compare pointers.
type arch struct {
	name    string   // as uname -m tells it
	goarch  string   // as Go calls it
	systems []string // that its guests build for, as Nix calls them
	elf     elf.Machine
	qemu    string // name of the program
	hint    string // how to get that
	machine string // value of -M but for the memory
	console string // of the guest's kernel
	// cpuKVM and cpuTCG are values of -cpu.
	cpuKVM, cpuTCG string
	// parameters are for the kernel of an emulated guest.
	parameters []string
	// devices are those that others do not have. Emulated guests do without: they
	// are a second way to tell clones apart, and when a clone begins its kernel
	// would interpret the firmware's code about them for longer than all of the
	// first way takes.
	devices []string
	// kvmModules are what a guest needs to run guests, the ones that this
	// processor has no use for included.
	kvmModules []string
}

var (
	archX8664 = &arch{
		name: "x86_64", goarch: "amd64", systems: []string{"x86_64-linux", "i686-linux"}, elf: elf.EM_X86_64,
		qemu: "qemu-system-x86_64", hint: "Debian: apt install qemu-system-x86; Fedora: dnf install qemu-system-x86-core; NixOS: the package qemu",
		machine: "q35,vmport=off,smm=off,sata=off,usb=off,graphics=off", console: "ttyS0",
		cpuKVM: "host,migratable=on", cpuTCG: "max",
		parameters: []string{"no_timer_check", "mitigations=off", "nokaslr"},
		devices:    []string{"vmgenid,guid=auto"},
		kvmModules: []string{"kvm_amd", "kvm_intel"},
	}
	archAArch64 = &arch{
		name: "aarch64", goarch: "arm64", systems: []string{"aarch64-linux"}, elf: elf.EM_AARCH64,
		qemu: "qemu-system-aarch64", hint: "Debian: apt install qemu-system-arm; Fedora: dnf install qemu-system-aarch64-core; NixOS: the package qemu",
		// The default interrupt controller serves no more than 8 processors.
		machine: "virt,gic-version=max", console: "ttyAMA0",
		cpuKVM: "host", cpuTCG: "neoverse-n1",
		parameters: []string{"mitigations=off", "nokaslr"},
	}
	arches = []*arch{archX8664, archAArch64}
)

// hostArch is that of this machine, or an error if guests of it are not known.
func hostArch() (*arch, error) {
	for _, a := range arches {
		if a.goarch == runtime.GOARCH {
			return a, nil
		}
	}
	return nil, fmt.Errorf("guests are not known for the processors of this machine (%s)", runtime.GOARCH)
}

// hostArchName is the name of hostArch, or else "".
func hostArchName() string {
	if a, err := hostArch(); err == nil {
		return a.name
	}
	return ""
}

// archOf returns the one whose guests build for a system, nil if there is none.
func archOf(system string) *arch {
	for _, a := range arches {
		if slices.Contains(a.systems, system) {
			return a
		}
	}
	return nil
}

// archOfELF returns the one whose machine code a program holds, nil if it is
// none of them.
func archOfELF(m elf.Machine) *arch {
	for _, a := range arches {
		if a.elf == m {
			return a
		}
	}
	return nil
}

// named reports whether a kernel release tells its architecture, as Debian's
// and Fedora's do.
func (a *arch) named(release string) bool {
	return strings.Contains(release, a.name) || strings.Contains(release, a.goarch)
}
