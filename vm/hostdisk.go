package vm

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Scratch disks are sparse, and together larger than what is free on the host's
// disk: most builds write little. When it becomes full nevertheless, the build
// that has written most has to go, and the others go on.

// errHostDisk is the end of a build that cannot write to its scratch disk.
var errHostDisk = errors.New("the disk of the host is full: a guest cannot write to its scratch disk")

// scratchFiles are the scratch disks of the guests that run.
type scratchFiles struct {
	mu    sync.Mutex // guards files
	files map[*os.File]bool
}

func (s *scratchFiles) add(f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files == nil {
		s.files = make(map[*os.File]bool)
	}
	s.files[f] = true
}

// remove forgets and closes a file.
func (s *scratchFiles) remove(f *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, f)
	return f.Close()
}

// taken returns how many bytes of the disk all files take together.
func (s *scratchFiles) taken() (bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := range s.files {
		bytes += taken(f)
	}
	return bytes
}

// largest reports whether no other file takes more of the disk than f, and how
// many bytes that are.
func (s *scratchFiles) largest(f *os.File) (bytes int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	bytes = taken(f)
	for other := range s.files {
		if taken(other) > bytes {
			return bytes, false
		}
	}
	return bytes, true
}

// taken returns how many bytes of the disk a file takes.
func taken(f *os.File) int64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0 // it cannot fail for an open file
	}
	return st.Blocks * 512
}

// checkHostDisk returns an error if the host's disk is full and the build has to
// go for it.
func (b *build) checkHostDisk() error {
	if b.r.cfg.Room == nil {
		return nil
	}
	err := b.r.cfg.Room()
	if err == nil {
		return nil
	}
	if n, ok := b.r.scratches.largest(b.g.scratch); ok {
		return fmt.Errorf("%w; it takes %d MiB, more than any other: %w", errHostDisk, n>>20, err)
	}
	return nil
}

// whyHostDisk adds to errHostDisk what the owner of the disk says, and returns
// other errors as they are.
func (b *build) whyHostDisk(err error) error {
	if errors.Is(err, errHostDisk) && b.r.cfg.Room != nil {
		if room := b.r.cfg.Room(); room != nil {
			return fmt.Errorf("%w: %w", err, room)
		}
	}
	return err
}
