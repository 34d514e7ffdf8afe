package vm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// When the host's disk is full, the build that wrote most ends, with the reason
// of whoever looked.
func TestHostDisk(t *testing.T) {
	full := errors.New("no space left in the store")
	var room error
	r := &Runner{cfg: Config{Room: func() error { return room }}}
	builds := make([]*build, 3)
	for i, size := range []int{1 << 20, 3 << 20, 2 << 20} {
		f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
		if err != nil {
			t.Fatal(err)
		}
		// Sparse bytes are not taken.
		if err := errors.Join(f.Truncate(1<<40>>i), second(f.Write(make([]byte, size)))); err != nil {
			t.Fatal(err)
		}
		r.scratches.add(f)
		builds[i] = &build{r: r, g: &guestVM{scratch: f}}
	}
	check := func(what string, ends int) {
		t.Helper()
		for i, b := range builds {
			err := b.checkHostDisk()
			if (err != nil) != (i == ends) || (err != nil && (!errors.Is(err, full) || !errors.Is(err, errHostDisk))) {
				t.Errorf("%s: build %d: %v", what, i, err)
			}
		}
	}
	check("room", -1)
	room = full
	check("full", 1)
	if err := r.scratches.remove(builds[1].g.scratch); err != nil {
		t.Fatal(err)
	}
	builds = []*build{builds[0], builds[2]}
	check("the next", 1)
	if err := builds[0].whyHostDisk(errHostDisk); !errors.Is(err, full) {
		t.Errorf("a failed write: %v", err)
	}
	if err := builds[0].whyHostDisk(errGuestEnded); err != errGuestEnded {
		t.Errorf("another end: %v", err)
	}
	for _, b := range builds {
		if err := r.scratches.remove(b.g.scratch); err != nil {
			t.Error(err)
		}
	}
}

// second returns the second of two values.
func second[T any](_ T, err error) error { return err }
