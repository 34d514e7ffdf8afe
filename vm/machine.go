package vm

import (
	"fmt"
	"slices"
)

// Memory that a guest has beside its build's, in MiB.
const (
	// reservedMiB is for the guest's kernel and agent.
	reservedMiB = 192
	// overheadMiB is for QEMU itself, its translation cache included.
	overheadMiB = 256
)

// The sizes of guests. A template is made for each size that is used, so there
// are few. Memory that a build does not use costs each guest 16 MiB a GiB for
// the kernel's page table; what bounds a build is its cgroup in the guest and
// QEMU's on the host.
var (
	memoryClasses = []int{2560, 4608, 8704, 16896, 33280, 66048, 131584} // MiB; powers of two and a half GiB
	vcpuClasses   = []int{1, 2, 4, 8, 16, 32, 64, 128}
)

// MemoryCostMiB is the memory of the host that a build may take, given what
// Spec.MemoryMiB allows it: the build, the guest's kernel and agent, and QEMU.
func MemoryCostMiB(memoryMiB int) int { return memoryMiB + reservedMiB + overheadMiB }

// machineFor returns the smallest machine for a build.
func (p *platform) machineFor(cores, memoryMiB int) (machine, error) {
	m := machine{arch: p.arch, accel: p.accel, tscKHz: p.tscKHz}
	var ok bool
	if m.vcpus, ok = atLeast(vcpuClasses, cores); !ok {
		return m, fmt.Errorf("a guest has at most %d processors, not %d", slices.Max(vcpuClasses), cores)
	}
	if m.memoryMiB, ok = atLeast(memoryClasses, memoryMiB+reservedMiB); !ok {
		return m, fmt.Errorf("a guest has at most %d MiB of memory, not %d", slices.Max(memoryClasses), memoryMiB+reservedMiB)
	}
	return m, nil
}

// atLeast returns the first class, in rising order, that is not below n.
func atLeast(classes []int, n int) (int, bool) {
	for _, c := range classes {
		if c >= n {
			return c, true
		}
	}
	return 0, false
}
