package server

import (
	"testing"

	"nbd/vm"
)

func TestFillRoom(t *testing.T) {
	overhead := vm.MemoryCostMiB(0)
	for _, c := range []struct {
		name      string
		cfg       BuildsConfig
		mem, most int
		fails     bool
	}{
		{"ample", BuildsConfig{CPUs: 2, MemoryMiB: 2048, Room: Room{MemoryMiB: 16000 + overhead}}, 2048, 16000, false},
		{"ceiling", BuildsConfig{CPUs: 2, MemoryMiB: 2048, MaxMemoryMiB: 4096, Room: Room{MemoryMiB: 16000 + overhead}}, 2048, 4096, false},
		{"small", BuildsConfig{CPUs: 2, MemoryMiB: 2048, Room: Room{MemoryMiB: 1000 + overhead}}, 1000, 1000, false},
		{"too small", BuildsConfig{CPUs: 2, MemoryMiB: 2048, Room: Room{MemoryMiB: overhead + 10}}, 0, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := fillRoom(&c.cfg)
			if c.fails {
				if err == nil {
					t.Error("no error")
				}
				return
			}
			if err != nil || c.cfg.MemoryMiB != c.mem || c.cfg.MaxMemoryMiB != c.most {
				t.Errorf("%d to %d MiB, %v", c.cfg.MemoryMiB, c.cfg.MaxMemoryMiB, err)
			}
			if c.cfg.Room.Guests < 1 || c.cfg.Room.CPUs < 2 {
				t.Errorf("room %+v", c.cfg.Room)
			}
		})
	}
}

func TestMachineMemory(t *testing.T) {
	if n, err := machineMemoryMiB(); err != nil || n < 64 {
		t.Errorf("%d MiB, %v", n, err)
	}
	if n, err := parseMemTotal("X: 1 kB\nMemTotal:       2048000 kB\n"); err != nil || n != 2000 {
		t.Errorf("%d, %v", n, err)
	}
	for _, text := range []string{"", "MemTotal: x kB", "MemTotal: 5"} {
		if _, err := parseMemTotal(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}
