package vm

import (
	"cmp"
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
//
// With hardware, a processor is brought up in no time, by those who want it: one
// template serves many numbers of them. Emulated, the first one costs a clone
// 0.4 seconds of CPU time and each other 0.2, and those that are up already but
// idle 0.1 each: so there each number has a template that has all of them up.
var (
	memoryClasses   = []int{2560, 4608, 8704, 16896, 33280, 66048, 131584} // MiB; powers of two and a half GiB
	vcpuClasses     = []int{8, 32, 128}
	emulatedClasses = []int{1, 2, 4, 8, 16, 32, 64, 128}
)

// largerMemory is how many times more memory a guest may have than it needs, if a
// template of its size is missing.
const largerMemory = 4

// MemoryCostMiB is the memory of the host that a build may take, given what
// Spec.MemoryMiB allows it: the build, the guest's kernel and agent, and QEMU.
func MemoryCostMiB(memoryMiB int) int { return memoryMiB + reservedMiB + overheadMiB }

// machineFor returns the smallest machine for a build. That there is none is a
// *SpecError.
func (p *platform) machineFor(s *Spec) (_ machine, err error) {
	m := machine{arch: p.arch, accel: p.accel, tscKHz: p.tscKHz, onDemand: p.onDemand}
	classes := emulatedClasses
	if m.onDemand {
		classes = vcpuClasses
	}
	var ok bool
	if m.vcpus, ok = atLeast(classes, s.Cores); !ok {
		return m, specErrorf("a guest has at most %d processors, not %d", slices.Max(classes), s.Cores)
	}
	if m.memoryMiB, ok = atLeast(memoryClasses, s.MemoryMiB+reservedMiB); !ok {
		return m, specErrorf("a build has at most %d MiB of memory, not %d", slices.Max(memoryClasses)-reservedMiB, s.MemoryMiB)
	}
	if m.scratchGiB, err = scratchGiB(cmp.Or(s.ScratchMiB, DefaultScratchMiB)); err != nil {
		return m, specErrorf("%v", err)
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

// serves reports whether a build that wants w can as well have m, which is no
// smaller.
func (m machine) serves(w machine) bool {
	size := m
	size.vcpus, size.memoryMiB = w.vcpus, w.memoryMiB
	return size == w && m.vcpus >= w.vcpus && m.memoryMiB >= w.memoryMiB && m.memoryMiB <= largerMemory*w.memoryMiB
}
