package vm

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
)

// DiskSize is the size in bytes that guests see of their input disk and of
// their sink: both exist before it is known what they will hold, and a saved
// guest keeps the size it was saved with.
const DiskSize = 1 << 40

// A Disk is a read-only disk of DiskSize bytes that reads as zeros until its
// content is bound, so that a guest can start, or be saved, without it. Its
// methods are safe for concurrent use.
type Disk struct {
	content atomic.Pointer[diskContent]
	failure failure
}

// diskContent is what a Disk was bound to.
type diskContent struct {
	src  io.ReaderAt
	size int64
}

// NewDisk returns a Disk without content.
func NewDisk() *Disk { return &Disk{failure: newFailure()} }

// Bind gives the disk its content, once: size bytes of src, zeros after them.
// What the guest read before is stale in its caches; it must drop them
// (BLKFLSBUF). src must be safe for concurrent use until the server of the disk
// is closed.
func (d *Disk) Bind(src io.ReaderAt, size int64) error {
	if size < 0 || size > DiskSize {
		return fmt.Errorf("bind disk: %d bytes do not fit into %d", size, int64(DiskSize))
	}
	if !d.content.CompareAndSwap(nil, &diskContent{src, size}) {
		return errors.New("bind disk: it has content already")
	}
	return nil
}

// Failed is closed when a read of the content failed for the first time. The
// guest was told of an input/output error: whatever its build says afterwards
// is our failure.
func (d *Disk) Failed() <-chan struct{} { return d.failure.failed }

// Err returns the error of the first read that failed, nil if none did.
func (d *Disk) Err() error { return d.failure.get() }

// Serve serves the disk to clients of the Network Block Device protocol that
// connect to l, until the server is closed. It takes over l. A nil logger
// discards.
func (d *Disk) Serve(l net.Listener, log *slog.Logger) *NBDServer { return serveNBD(l, d, log) }

func (d *Disk) writable() bool { return false }

func (d *Disk) write([]byte, int64) error { return errors.New("disk is read-only") }

// read fills p from off, which lies within DiskSize.
func (d *Disk) read(p []byte, off int64) error {
	c := d.content.Load()
	have := 0
	if c != nil && off < c.size {
		have = int(min(int64(len(p)), c.size-off))
		if err := readFull(c.src, p[:have], off); err != nil {
			err = fmt.Errorf("read input disk: %w", err)
			d.failure.set(err)
			return err
		}
	}
	clear(p[have:])
	return nil
}

// A failure keeps the first error of something and tells that there is one.
type failure struct {
	once   *sync.Once
	err    error // written before failed is closed
	failed chan struct{}
}

func newFailure() failure {
	return failure{once: new(sync.Once), failed: make(chan struct{})}
}

// set records err unless there is an error already.
func (f *failure) set(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.failed)
	})
}

// get returns the recorded error.
func (f *failure) get() error {
	select {
	case <-f.failed:
		return f.err
	default:
		return nil
	}
}
