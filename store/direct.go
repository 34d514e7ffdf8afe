package store

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A commit of one path, as the serve protocol wants them, is a few thousand
// bytes that have to be on the disk before the next one comes. Appending to a
// file and syncing it makes the file system write, beside the bytes, where they
// are and how long the file is now. So the last segment has zeros ahead of its
// end, which are on the disk already, and a small commit overwrites some of
// them, past the page cache: one system call, one request to the disk, nothing
// else changes (BenchmarkOneByOne). After a crash, the zeros are bytes that are
// no frame.

const (
	// directBlock is what such writes are aligned to: a multiple of the sectors
	// of all disks.
	directBlock = 4 << 10
	// directLimit is how long a commit may be that is written so.
	directLimit = 64 << 10
	// directAhead is how many zeros are written at once.
	directAhead = 512 << 10
)

// A directWriter writes to the end of one segment. It is used by one goroutine
// at a time.
type directWriter struct {
	plain *os.File // the segment, through the page cache
	f     *os.File // the same, past it; what is written is durable
	buf   []byte   // aligned to a block
	// tail is the end of the segment for which buf begins with the part of the
	// last block that is in use; -1 if it has to be read.
	tail int64
	// zeroed is up to where the file has durable zeros.
	zeroed int64
}

// newDirectWriter returns a writer for a segment that ends at size. Some file
// systems cannot do it: errors.ErrUnsupported.
func newDirectWriter(plain *os.File, size int64) (*directWriter, error) {
	f, err := os.OpenFile(plain.Name(), os.O_WRONLY|unix.O_DIRECT|unix.O_DSYNC, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil, errors.ErrUnsupported
	}
	if err != nil {
		return nil, err
	}
	// Memory of its own, because Go promises no alignment.
	buf, err := unix.Mmap(-1, 0, directLimit+2*directBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &directWriter{plain: plain, f: f, buf: buf, tail: -1, zeroed: size}, nil
}

// write makes pieces, total bytes in all, durable at off, the end of the
// segment. It returns errors.ErrUnsupported, and has changed nothing in use, if
// that has to be done in another way.
func (d *directWriter) write(pieces [][]byte, total, off int64) error {
	start := off &^ (directBlock - 1)
	end := blockUp(off + total)
	if total > directLimit {
		return errors.ErrUnsupported
	}
	if err := d.reserve(off, end); err != nil {
		return err
	}
	if d.tail != off {
		if _, err := d.plain.ReadAt(d.buf[:off-start], start); err != nil {
			return fmt.Errorf("read end of segment: %w", err)
		}
	}
	n := off - start
	for _, p := range pieces {
		n += int64(copy(d.buf[n:], p))
	}
	clear(d.buf[n : end-start])
	d.tail = -1
	if _, err := d.f.WriteAt(d.buf[:end-start], start); err != nil {
		return err
	}
	copy(d.buf, d.buf[n&^(directBlock-1):n])
	d.tail = off + total
	return nil
}

// reserve sees to it that the file has durable zeros from off, its end, to end.
func (d *directWriter) reserve(off, end int64) error {
	d.zeroed = max(d.zeroed, off)
	if end <= d.zeroed {
		return nil
	}
	zeros := make([]byte, end+directAhead-d.zeroed)
	_, err := d.plain.WriteAt(zeros, d.zeroed)
	if err == nil {
		err = unix.Fdatasync(int(d.plain.Fd()))
	}
	if err != nil {
		if errors.Is(diskError(err), ErrNoSpace) {
			err = errors.ErrUnsupported // perhaps there is room for the commit itself
		}
		return errors.Join(err, d.trim(off))
	}
	d.zeroed = end + directAhead
	return nil
}

// trim takes away what follows size, the end of the segment.
func (d *directWriter) trim(size int64) error {
	if d.zeroed <= size {
		return nil
	}
	d.zeroed, d.tail = size, -1
	return d.f.Truncate(size)
}

// close ends the writing to a segment that ends at size.
func (d *directWriter) close(size int64) error {
	return errors.Join(d.trim(size), d.f.Close(), unix.Munmap(d.buf))
}

// blockUp returns n, rounded up to a multiple of directBlock.
func blockUp(n int64) int64 { return (n + directBlock - 1) &^ (directBlock - 1) }
