package guest

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"nbd/vm/link"
)

// fakeGroup returns a cgroup of plain files.
func fakeGroup(t *testing.T) *cgroup {
	t.Helper()
	c := &cgroup{dir: t.TempDir()}
	for name, text := range map[string]string{
		"cpu.stat": "user_usec 2000000\nsystem_usec 1500000\n", "memory.events": "oom_kill 0\n", "pids.events": "max 0\n", "memory.peak": "4096\n",
	} {
		must(t, os.WriteFile(filepath.Join(c.dir, name), []byte(text), 0o644))
	}
	return c
}

// TestSampler has a disk that is full for a moment between others.
func TestSampler(t *testing.T) {
	var looks atomic.Int32
	seen := make(chan struct{}) // closed once
	disk := func() (diskUse, error) {
		switch looks.Add(1) {
		case 1:
			return diskUse{used: 1 << 20, free: 1 << 10}, nil
		case 2:
			return diskUse{used: 3 << 20, free: 0, full: true}, nil
		}
		return diskUse{used: 2 << 20, free: 1 << 10}, nil
	}
	var latest atomic.Pointer[link.Usage]
	s := startSampler(fakeGroup(t), disk, func() { close(seen) }, &latest)
	<-seen
	want := link.Usage{CPUUser: 2 * time.Second, CPUSystem: 1500 * time.Millisecond, PeakMemory: 4096, PeakScratch: 3 << 20}
	used, full, err := s.stop()
	must(t, err)
	if used != want || *latest.Load() != want || !full {
		t.Errorf("%+v, latest %+v, full %v", used, *latest.Load(), full)
	}
}

func TestSamplerFails(t *testing.T) {
	broken := errors.New("broken")
	var latest atomic.Pointer[link.Usage]
	s := startSampler(fakeGroup(t), func() (diskUse, error) { return diskUse{}, broken }, nil, &latest)
	if _, _, err := s.stop(); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

func TestUntilNextLook(t *testing.T) {
	for free, want := range map[int64]time.Duration{
		-1: leastBetweenLooks, 0: leastBetweenLooks, 1 << 29: 500 * time.Millisecond, 1 << 40: mostBetweenLooks,
	} {
		if got := untilNextLook(free); got != want {
			t.Errorf("%d bytes free: %v, want %v", free, got, want)
		}
	}
}
