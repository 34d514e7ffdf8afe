package vm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The memory of a saved guest is a file with holes. What is copied for each
// clone is what lies between them, so whatever is worth nothing becomes a hole.

const (
	guestPage = 4 << 10
	// poison is what the kernel fills memory with that held its initramfs and
	// its own beginnings, before it frees it (POISON_FREE_INITMEM).
	poison = 0xcc
	// minPoison is how much poison in a row is taken for freed memory. Nothing
	// in use looks like that; and what was allocated from it and not written
	// yet may as well be zero.
	minPoison = 1 << 20
)

var (
	zeroPage   = make([]byte, guestPage)
	poisonPage = bytes.Repeat([]byte{poison}, guestPage)
)

// scrub makes holes in the first size bytes of a guest's memory where it is
// zero, or was freed by the kernel when it had started.
func scrub(ram *os.File, size int64) error {
	err := eachData(ram, size, func(off, n int64) error {
		b, err := unix.Mmap(int(ram.Fd()), off, int(n), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("map: %w", err)
		}
		var holes [][2]int
		for i := 0; i < len(b); {
			length := worthless(b[i:])
			if length > 0 {
				holes = append(holes, [2]int{i, length})
			}
			i += max(length, guestPage)
		}
		if err := unix.Munmap(b); err != nil {
			return err
		}
		for _, h := range holes {
			const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
			if err := unix.Fallocate(int(ram.Fd()), mode, off+int64(h[0]), int64(h[1])); err != nil {
				return fmt.Errorf("punch hole: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("scrub template: %w", err)
	}
	return nil
}

// worthless returns how many of the bytes at the start of b, which are whole
// pages, need not be kept.
func worthless(b []byte) (n int) {
	if n = leading(b, zeroPage); n == 0 {
		if n = leading(b, poisonPage); n < minPoison {
			n = 0
		}
	}
	return n
}

// leading returns how many bytes of b are page after page.
func leading(b, page []byte) (n int) {
	for len(b)-n >= guestPage && bytes.Equal(b[n:n+guestPage], page) {
		n += guestPage
	}
	return n
}

// copySparse copies the first size bytes of a file in memory, but for its
// holes, to another one that is empty. The kernel does it from file to file:
// each byte is touched once.
func copySparse(to, from *os.File, size int64) error {
	err := eachData(from, size, func(off, n int64) error {
		if _, err := to.Seek(off, io.SeekStart); err != nil {
			return err
		}
		for end := off + n; off < end; {
			sent, err := unix.Sendfile(int(to.Fd()), int(from.Fd()), &off, int(end-off))
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			if sent == 0 && err == nil {
				return io.ErrUnexpectedEOF
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("copy template: %w", err)
	}
	return nil
}

// eachData calls f for each part of the first size bytes of a file that is no
// hole; it begins and ends with a page.
func eachData(file *os.File, size int64, f func(off, n int64) error) error {
	fd := int(file.Fd())
	for off := int64(0); off < size; {
		start, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // a hole up to the end
		}
		if err == nil {
			off, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		}
		if err == nil {
			err = f(start, min(off, size)-start)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
