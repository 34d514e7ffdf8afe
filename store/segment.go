package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// segmentLimit is how long a segment gets before the next one is begun.
const segmentLimit = 64 << 20

// maxOpenSegments is how many segments stay open when nobody reads them.
const maxOpenSegments = 256

// segments are the files that hold small NARs and commits. New frames go to the
// end of the last one.
type segments struct {
	dir string

	// writing is held while frames are written, so that there is no gap before
	// a frame that was written. It is taken before mu, and guards direct; last
	// and its size change only with both held.
	writing sync.Mutex
	direct  *directWriter // to last; nil before it was first used
	buffer  bool          // direct writing is not possible here
	fault   func() error  // fails a write half-way, in tests

	mu    sync.Mutex // guards what follows
	open  map[uint64]*segment
	last  *segment
	dirty map[*segment]bool // written to since the last sync
}

// A segment is an open segment file. It is closed when it was removed, or the
// store was closed, and nobody reads it any more.
type segment struct {
	id   uint64
	f    *os.File
	size int64
	refs int // readers, and one for being in segments.open; guarded by segments.mu
	// bad says that a sync failed: what was written since the last one may be
	// lost even if a later sync succeeds. Guarded by segments.mu.
	bad bool
	// held counts the bursts that wrote NARs which no commit names yet.
	// Guarded by segments.mu.
	held int
}

// A place is where a frame begins.
type place struct {
	segment uint64
	offset  int64
}

func (g *segments) path(id uint64) string { return filepath.Join(g.dir, fmt.Sprintf("%08d", id)) }

// list returns the ids of the segment files in increasing order.
func (g *segments) list() ([]uint64, error) {
	entries, err := os.ReadDir(g.dir)
	if err != nil {
		return nil, err
	}
	var ids []uint64
	for _, e := range entries { // sorted by name; ids beyond eight digits sort wrongly
		if id, err := strconv.ParseUint(e.Name(), 10, 64); err == nil && id > 0 && filepath.Base(g.path(id)) == e.Name() {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// openLocked returns the segment with that id.
func (g *segments) openLocked(id uint64) (*segment, error) {
	if s := g.open[id]; s != nil {
		return s, nil
	}
	f, err := os.OpenFile(g.path(id), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	s := &segment{id: id, f: f, size: fi.Size(), refs: 1}
	g.open[id] = s
	return s, nil
}

// acquire opens a segment for reading until release.
func (g *segments) acquire(id uint64) (*segment, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, err := g.openLocked(id)
	if err != nil {
		return nil, err
	}
	s.refs++
	return s, nil
}

func (g *segments) release(s *segment) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.releaseLocked(s)
}

func (g *segments) releaseLocked(s *segment) error {
	s.refs--
	if s.refs == 1 && g.open[s.id] == s && s != g.last && !g.dirty[s] && s.held == 0 && len(g.open) > maxOpenSegments {
		delete(g.open, s.id)
		s.refs--
	}
	if s.refs == 0 {
		return s.f.Close()
	}
	return nil
}

// remove unlinks a segment; who has it acquired can still read it.
func (g *segments) remove(id uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.open[id]; s != nil {
		delete(g.open, id)
		delete(g.dirty, s)
		if err := g.releaseLocked(s); err != nil {
			return err
		}
	}
	return os.Remove(g.path(id))
}

// start begins a new segment.
func (g *segments) start() error {
	id := uint64(1)
	if g.last != nil {
		id = g.last.id + 1
	}
	if err := g.endDirect(); err != nil {
		return err
	}
	f, err := os.OpenFile(g.path(id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := syncDir(g.dir); err != nil {
		f.Close()
		return errors.Join(err, os.Remove(g.path(id)))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last = &segment{id: id, f: f, refs: 1}
	g.open[id] = g.last
	return nil
}

// endDirect ends the direct writing to the last segment.
func (g *segments) endDirect() error {
	d := g.direct
	if d == nil {
		return nil
	}
	g.direct = nil
	return d.close(g.last.size)
}

// append writes frames, whole ones, to the end of the last segment and returns
// where they are. frames is told the place and returns them in pieces. What
// was written is not durable before sync. After an error nothing is there.
func (g *segments) append(frames func(at place) ([][]byte, error)) (place, error) {
	g.writing.Lock()
	defer g.writing.Unlock()
	at, pieces, err := g.place(frames)
	if err != nil {
		return place{}, err
	}
	return at, g.write(pieces)
}

// appendDurably is append and then sync of all that was appended before, too.
func (g *segments) appendDurably(frames func(at place) ([][]byte, error)) (place, error) {
	at, durable, err := g.appendSmall(frames)
	if err == nil && !durable {
		err = g.sync()
	}
	return at, err
}

// appendSmall is append; it reports whether what was written, and all before
// it, is durable already.
func (g *segments) appendSmall(frames func(at place) ([][]byte, error)) (at place, durable bool, err error) {
	g.writing.Lock()
	defer g.writing.Unlock()
	at, pieces, err := g.place(frames)
	if err != nil {
		return place{}, false, err
	}
	if !g.isDirty() {
		if err = g.writeDirect(pieces); !errors.Is(err, errors.ErrUnsupported) {
			return at, true, err
		}
	}
	return at, false, g.write(pieces)
}

// place decides where frames go.
func (g *segments) place(frames func(at place) ([][]byte, error)) (at place, pieces [][]byte, err error) {
	if s := g.last; s == nil || s.size >= segmentLimit || g.lost(s.id) {
		if err := g.start(); err != nil {
			return place{}, nil, fmt.Errorf("begin segment: %w", diskError(err))
		}
	}
	at = place{g.last.id, g.last.size}
	pieces, err = frames(at)
	return at, pieces, err
}

// write appends pieces to the last segment, through the page cache.
func (g *segments) write(pieces [][]byte) error {
	s := g.last
	off := s.size
	for _, p := range joined(pieces) {
		n, err := s.f.WriteAt(p, off)
		if err == nil && g.fault != nil {
			err = g.fault()
		}
		if err != nil {
			return fmt.Errorf("write segment: %w", diskError(errors.Join(err, g.cut())))
		}
		off += int64(n)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s.size = off
	g.dirty[s] = true
	return nil
}

// writeDirect appends pieces to the last segment and makes them durable. It
// returns errors.ErrUnsupported, and nothing is there, if they are not few
// or the file system cannot.
func (g *segments) writeDirect(pieces [][]byte) (err error) {
	s := g.last
	if g.direct == nil && !g.buffer {
		g.direct, err = newDirectWriter(s.f, s.size)
		g.buffer = errors.Is(err, errors.ErrUnsupported)
	}
	if g.direct == nil {
		return errors.ErrUnsupported
	}
	total := length(pieces)
	err = g.direct.write(pieces, total, s.size)
	if err == nil && g.fault != nil {
		err = g.fault()
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return err
	case errors.Is(err, unix.EINVAL): // not with this alignment
		g.buffer = true
		return errors.Join(errors.ErrUnsupported, g.endDirect())
	case err != nil:
		return fmt.Errorf("write segment: %w", diskError(errors.Join(err, g.cut())))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s.size += total
	return nil
}

// isDirty reports whether something was written since the last sync.
func (g *segments) isDirty() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.dirty) > 0
}

// length returns the length of pieces in all.
func length(pieces [][]byte) (n int64) {
	for _, p := range pieces {
		n += int64(len(p))
	}
	return n
}

// joinAt is up to how many bytes copying costs less than another system call.
const joinAt = 32 << 10

// joined returns pieces as one if they are small.
func joined(pieces [][]byte) [][]byte {
	if len(pieces) < 2 || length(pieces) > joinAt {
		return pieces
	}
	return [][]byte{slices.Concat(pieces...)}
}

// hold keeps a segment from being removed until unhold. It is called by the
// function that append calls.
func (g *segments) hold(id uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open[id].held++
}

// unhold takes back a hold.
func (g *segments) unhold(id uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.open[id]; s != nil {
		s.held--
	}
}

// idle returns the size of a segment that nobody writes to: it is not the last
// one, and no burst holds it.
func (g *segments) idle(id uint64) (size int64, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, err := g.openLocked(id)
	if err != nil || s == g.last || s.held > 0 {
		return 0, false
	}
	return s.size, true
}

// cut takes away what follows the end of the last segment. If that fails too,
// the segment gets no more frames: a reader of commits stops at the bytes in
// question.
func (g *segments) cut() error {
	s := g.last
	var err error
	if g.direct != nil {
		err = g.endDirect()
	}
	if err == nil {
		err = s.f.Truncate(s.size)
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, g.start())
}

// lost reports whether a sync of the segment failed.
func (g *segments) lost(id uint64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.open[id]
	return s != nil && s.bad
}

// sync makes durable what was appended before. After an error it is not, and
// the segments concerned are lost to those who appended.
func (g *segments) sync() error {
	g.mu.Lock()
	var files []*segment
	for s := range g.dirty {
		s.refs++
		files = append(files, s)
	}
	clear(g.dirty)
	g.mu.Unlock()
	var failed error
	for _, s := range files {
		err := unix.Fdatasync(int(s.f.Fd()))
		g.mu.Lock()
		if err != nil {
			failed = fmt.Errorf("sync segment: %w", diskError(err))
			s.bad = true
		}
		if err := g.releaseLocked(s); err != nil && failed == nil {
			failed = err
		}
		g.mu.Unlock()
	}
	return failed
}

// close closes the files; who has one acquired can still read it.
func (g *segments) close() error {
	g.writing.Lock()
	defer g.writing.Unlock()
	errs := []error{g.endDirect()}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.open {
		errs = append(errs, g.releaseLocked(s))
	}
	clear(g.open)
	g.last = nil
	return errors.Join(errs...)
}

// syncDir makes the entries of a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// diskError marks an error of a full disk with ErrNoSpace.
func diskError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w (%w)", ErrNoSpace, err)
	}
	return err
}
