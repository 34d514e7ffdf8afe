package server

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"nbd/vm"
)

// leastMemoryMiB is the least that a build is worth starting with.
const leastMemoryMiB = 256

// fillRoom gives zero fields of cfg.Room and cfg.MaxMemoryMiB their defaults,
// and makes the memory of a guest fit the room.
func fillRoom(cfg *BuildsConfig) error {
	if cfg.Room.MemoryMiB == 0 {
		total, err := machineMemoryMiB()
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
	if cfg.Room.CPUs == 0 {
		cfg.Room.CPUs = 2 * runtime.NumCPU()
	}
	cfg.CPUs = min(cfg.CPUs, cfg.Room.CPUs)
	if cfg.Room.Guests == 0 {
		cfg.Room.Guests = max(1, min(cfg.Room.MemoryMiB/vm.MemoryCostMiB(cfg.MemoryMiB), cfg.Room.CPUs/cfg.CPUs))
	}
	return nil
}

// machineMemoryMiB returns how much memory the machine has.
func machineMemoryMiB() (int, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseMemTotal(string(text))
}

// parseMemTotal reads the line "MemTotal: N kB" of /proc/meminfo.
func parseMemTotal(text string) (int, error) {
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 3 && words[0] == "MemTotal:" && words[2] == "kB" {
			kib, err := strconv.Atoi(words[1])
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no MemTotal in /proc/meminfo")
}
