package vm

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLoad(t *testing.T) {
	r := &Runner{}
	if got := r.Load(); got != (Load{}) {
		t.Errorf("without guests: %+v", got)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 3<<20)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil { // blocks are given when they are written
		t.Fatal(err)
	}
	r.scratches.add(f)
	remove := r.processes.add(os.Getpid())
	if got := r.Load(); got.MemoryMiB == 0 || got.DiskMiB < 2 || got.DiskMiB > 4 {
		t.Errorf("with one: %+v", got)
	}
	remove()
	if err := r.scratches.remove(f); err != nil {
		t.Fatal(err)
	}
	if got := r.Load(); got != (Load{}) {
		t.Errorf("afterwards: %+v", got)
	}
}

func TestResidentOf(t *testing.T) {
	page := int64(os.Getpagesize())
	for text, want := range map[string]int64{"100 7 3 1 0 5 0\n": 7 * page, "": 0, "1": 0, "1 x": 0} {
		if got := residentOf(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
