package server

import (
	"fmt"
	"runtime"

	"nbd/vm"
)

// fillScratch gives the sizes of scratch disks their defaults, rounded up to those
// that there are.
func fillScratch(cfg *BuildsConfig) error {
	if cfg.ScratchMiB == 0 {
		cfg.ScratchMiB = vm.DefaultScratchMiB
	}
	if cfg.MaxScratchMiB == 0 {
		cfg.MaxScratchMiB = min(4*cfg.ScratchMiB, vm.MaxScratchMiB)
	}
	for _, n := range []*int{&cfg.ScratchMiB, &cfg.MaxScratchMiB} {
		size, err := vm.ScratchSize(*n)
		if err != nil {
			return err
		}
		*n = int(size >> 20)
	}
	cfg.MaxScratchMiB = max(cfg.MaxScratchMiB, cfg.ScratchMiB)
	return nil
}

// leastMemoryMiB is the least that a build is worth starting with.
const leastMemoryMiB = 256

// fillRoom gives zero fields of cfg.Room and cfg.MaxMemoryMiB their defaults,
// and makes the memory of a guest fit the room.
func fillRoom(cfg *BuildsConfig) error {
	if cfg.Room.MemoryMiB == 0 {
		total, err := NewMachine("", 0, nil, nil).totalMiB()
		if err != nil {
			return fmt.Errorf("find out how much memory there is: %w", err)
		}
		cfg.Room.MemoryMiB = total / 4 * 3
	}
	most := cfg.Room.MemoryMiB - vm.MemoryCostMiB(0)
	if most < leastMemoryMiB {
		return fmt.Errorf("%d MiB of memory for all guests are too few for one: at least %d MiB are needed",
			cfg.Room.MemoryMiB, vm.MemoryCostMiB(leastMemoryMiB))
	}
	cfg.MemoryMiB = min(cfg.MemoryMiB, most)
	if cfg.MaxMemoryMiB == 0 {
		cfg.MaxMemoryMiB = most
	}
	cfg.MaxMemoryMiB = max(min(cfg.MaxMemoryMiB, most), cfg.MemoryMiB)
	processors := runtime.GOMAXPROCS(0) // which knows of cgroups
	if cfg.Room.CPUs == 0 {
		cfg.Room.CPUs = 2 * processors
	}
	if cfg.MachineCPUs == 0 {
		cfg.MachineCPUs = processors
	}
	cfg.CPUs = min(cfg.CPUs, cfg.Room.CPUs)
	if cfg.Room.Guests == 0 {
		cfg.Room.Guests = max(1, min(cfg.Room.MemoryMiB/vm.MemoryCostMiB(cfg.MemoryMiB), cfg.Room.CPUs/cfg.CPUs))
	}
	return nil
}
