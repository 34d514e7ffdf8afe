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

// TestFillScratch rounds sizes to powers of two GiB.
func TestFillScratch(t *testing.T) {
	for _, c := range []struct{ size, most, wantSize, wantMost int }{
		{0, 0, 64 << 10, 256 << 10},
		{1, 1500, 1 << 10, 2 << 10},
		{5000, 1000, 8 << 10, 8 << 10},
		{512 << 10, 0, 512 << 10, 1 << 20},
		{2 << 20, 0, 0, 0},
	} {
		cfg := BuildsConfig{ScratchMiB: c.size, MaxScratchMiB: c.most}
		if err := fillScratch(&cfg); (err != nil) != (c.wantSize == 0) {
			t.Errorf("%d to %d: %v", c.size, c.most, err)
		} else if err == nil && (cfg.ScratchMiB != c.wantSize || cfg.MaxScratchMiB != c.wantMost) {
			t.Errorf("%d to %d: got %d to %d", c.size, c.most, cfg.ScratchMiB, cfg.MaxScratchMiB)
		}
	}
}
