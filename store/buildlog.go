package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// liveLogs are the logs that are being written.
type liveLogs struct {
	mu   sync.Mutex
	logs map[BuildID]*BuildLog
}

// A BuildLog is a log that is being written. It is written by one goroutine,
// and read by any number (OpenBuildLog).
type BuildLog struct {
	s    *Store
	id   BuildID
	f    *os.File
	path string // without ".zst"
	left int64  // bytes that may be written before the next look at what is free

	mu      sync.Mutex
	size    int64
	done    bool
	waiters int
	more    chan struct{} // closed when there is more, or the log is done
}

// logPath returns the file of a build's log while it is written.
func (s *Store) logPath(id BuildID) string {
	return filepath.Join(s.dir, "logs", strconv.FormatUint(uint64(id)/1000, 10), strconv.FormatUint(uint64(id), 10)+".log")
}

// CreateBuildLog begins the log of a build. There is one log for a build:
// another is ErrExists. The caller closes it.
func (s *Store) CreateBuildLog(ctx context.Context, id BuildID) (*BuildLog, error) {
	l := &BuildLog{s: s, id: id, path: s.logPath(id), left: logStride, more: make(chan struct{})}
	s.logs.mu.Lock()
	defer s.logs.mu.Unlock()
	if err := l.create(); err != nil {
		return nil, fmt.Errorf("create log of build %d: %w", id, diskError(err))
	}
	if s.logs.logs == nil {
		s.logs.logs = make(map[BuildID]*BuildLog)
	}
	s.logs.logs[id] = l
	return l, nil
}

func (l *BuildLog) create() error {
	if _, err := os.Stat(l.path + ".zst"); err == nil {
		return ErrExists
	}
	if err := os.MkdirAll(filepath.Dir(l.path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return ErrExists
	}
	l.f = f
	return err
}

// logStride is how much of a log is written between looks at what is free on
// the disk.
const logStride = 1 << 20

// Write appends to the log. Readers see it at once; it is durable after Close.
// Like an upload a log leaves Config.MinFree of the disk free; else the error
// is ErrNoSpace.
func (l *BuildLog) Write(p []byte) (int, error) {
	if l.left -= int64(len(p)); l.left < 0 {
		if err := l.s.room(int64(len(p))); err != nil {
			return 0, fmt.Errorf("write log of build %d: %w", l.id, err)
		}
		l.left = logStride
	}
	n, err := l.f.Write(p)
	l.mu.Lock()
	l.size += int64(n)
	l.wakeLocked()
	l.mu.Unlock()
	if err != nil {
		return n, fmt.Errorf("write log of build %d: %w", l.id, diskError(err))
	}
	return n, nil
}

// wakeLocked tells those who wait for more.
func (l *BuildLog) wakeLocked() {
	if l.waiters > 0 {
		l.waiters = 0
		close(l.more)
		l.more = make(chan struct{})
	}
}

// Close ends the log and compresses it; readers that follow it come to its
// end. A log that cannot be compressed stays as it is, and can be read.
func (l *BuildLog) Close() error {
	l.mu.Lock()
	l.done = true
	l.wakeLocked()
	l.mu.Unlock()
	err := l.compress()
	l.s.logs.mu.Lock()
	delete(l.s.logs.logs, l.id)
	l.s.logs.mu.Unlock()
	if err = errors.Join(err, l.f.Close()); err != nil {
		return fmt.Errorf("end log of build %d: %w", l.id, diskError(err))
	}
	return nil
}

// compress replaces the file by a compressed one.
func (l *BuildLog) compress() error {
	if err := l.f.Sync(); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(filepath.Dir(l.path))); err != nil {
		return err
	}
	if err := l.s.storeCompressed(l.path+".zst", io.NewSectionReader(l.f, 0, l.size)); err != nil {
		return err
	}
	return os.Remove(l.path)
}

// storeCompressed writes what r has, compressed, to a file that appears,
// durable, when it is complete.
func (s *Store) storeCompressed(path string, r io.Reader) error {
	f, err := s.newBlobFile()
	if err != nil {
		return err
	}
	defer f.drop()
	enc, err := zstd.NewWriter(f, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	if _, err := io.Copy(enc, r); err != nil {
		return errors.Join(err, enc.Close())
	}
	if err := errors.Join(enc.Close(), f.err); err != nil {
		return err
	}
	if err := f.sync(); err != nil {
		return err
	}
	if err := os.Rename(f.path, path); err != nil {
		return err
	}
	f.path = ""
	return syncDir(filepath.Dir(path))
}

// openCompressed opens what storeCompressed wrote.
func openCompressed(path string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &compressed{dec, f}, nil
}

// compressed reads a compressed file.
type compressed struct {
	*zstd.Decoder
	f *os.File
}

func (c *compressed) Close() error {
	c.Decoder.Close()
	return c.f.Close()
}

// OpenBuildLog reads the log of a build (or the one that its record names as
// its log) from its beginning, byte for byte as it was written. While the log is being written, Read waits for more until
// it is closed or ctx ends; a log that has ended is io.EOF. ErrNotFound if the
// build has no log. The caller closes it.
func (s *Store) OpenBuildLog(ctx context.Context, id BuildID) (io.ReadCloser, error) {
	r, err := s.openBuildLog(ctx, id)
	if errors.Is(err, fs.ErrNotExist) {
		if b, recErr := s.Build(ctx, id); recErr == nil && b.LogOf != 0 {
			r, err = s.openBuildLog(ctx, b.LogOf)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("open log of build %d: %w", id, err)
	}
	return r, nil
}

func (s *Store) openBuildLog(ctx context.Context, id BuildID) (io.ReadCloser, error) {
	path := s.logPath(id)
	s.logs.mu.Lock()
	l := s.logs.logs[id]
	if l != nil {
		defer s.logs.mu.Unlock()
		f, err := os.Open(path)
		if err == nil {
			return &follower{ctx: ctx, l: l, f: f}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) { // else compressed a moment ago
			return nil, err
		}
		return openCompressed(path + ".zst")
	}
	s.logs.mu.Unlock()
	r, err := openCompressed(path + ".zst")
	if errors.Is(err, fs.ErrNotExist) { // the server ended while it was written
		return os.Open(path)
	}
	return r, err
}

// A follower reads a log that was being written when it was opened.
type follower struct {
	ctx context.Context
	l   *BuildLog
	f   *os.File
	off int64
}

func (r *follower) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		r.l.mu.Lock()
		left, done := r.l.size-r.off, r.l.done
		if left == 0 && !done {
			r.l.waiters++
		}
		more := r.l.more
		r.l.mu.Unlock()
		switch {
		case left > 0:
			n, err := r.f.ReadAt(p[:min(int64(len(p)), left)], r.off)
			r.off += int64(n)
			return n, err
		case done:
			return 0, io.EOF
		}
		select {
		case <-more:
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		}
	}
}

func (r *follower) Close() error { return r.f.Close() }
