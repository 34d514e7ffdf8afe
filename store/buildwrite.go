package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

// How records of builds reach the database:
//
//	WriteBuild ──▶ pending ──┬─ some time later, many at once ─▶ database
//	EndBuild ────▶ pending ──┘  at once, with all that wait
//
// What is pending is read by Build; lists and sums write it first. After a crash
// what was pending is lost, but for what EndBuild returned from; ids are never
// used again, because they come from blocks that were taken in the database.

// The times after which what is pending is written. That a build runs is
// written soon: should the server die, its record says so.
const (
	flushBuildsAfter = 200 * time.Millisecond
	flushLiveAfter   = 10 * time.Millisecond
)

// maxPendingBuilds is how many records may be pending before those who write
// wait.
const maxPendingBuilds = 8192

// The sizes of the blocks in which ids are taken: larger ones the more are
// needed, so that a restart skips few.
const firstIDs, maxIDs = 16, 4096

// buildWrites are the changes of builds that are not in the database.
type buildWrites struct {
	idMu      sync.Mutex // held while a block is taken; guards what follows
	next, end BuildID    // ids that can be given out: from next to before end
	block     uint64     // size of the last block

	mu      sync.Mutex // guards what follows; taken after Store.commitMu
	pending map[BuildID]pendingBuild
	ends    []End
	runs    []runEnd
	timer   *time.Timer // of the next flush; nil if none is due
	due     time.Time
	// asked and done count what was added to pending, and what of that is
	// written.
	asked, done uint64
}

// A pendingBuild is a record and its encoding.
type pendingBuild struct {
	build Build
	rec   []byte
}

// waiting returns the encoded record of a build if it is pending.
func (w *buildWrites) waiting(id BuildID) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pending[id].rec
}

// ReserveBuild returns an id that no build has had.
func (s *Store) ReserveBuild(ctx context.Context) (BuildID, error) {
	w := &s.builds
	w.idMu.Lock()
	defer w.idMu.Unlock()
	if w.next == w.end {
		block := min(max(2*w.block, firstIDs), maxIDs)
		err := s.update(func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketBuilds)
			first := b.Sequence() + 1
			w.next, w.end = BuildID(first), BuildID(first+block)
			return b.SetSequence(first + block - 1)
		})
		if err != nil {
			w.next, w.end = 0, 0
			return 0, fmt.Errorf("reserve ids of builds: %w", err)
		}
		w.block = block
	}
	id := w.next
	w.next++
	return id, nil
}

// WriteBuild stores a record over the one with its ID, if there is one. It is
// visible at once and durable a moment later. The lists and maps of b do not
// change afterwards.
func (s *Store) WriteBuild(ctx context.Context, b *Build) error {
	after := flushBuildsAfter
	if !b.ended() {
		after = flushLiveAfter
	}
	full, err := s.builds.add([]*Build{b}, nil)
	if err != nil {
		return fmt.Errorf("store build %d: %w", b.ID, err)
	}
	if full {
		return s.flushBuilds()
	}
	s.flushBuildsIn(after)
	return nil
}

// EndBuild stores records, as WriteBuild does, and what they ended with, all
// durable together when it returns.
func (s *Store) EndBuild(ctx context.Context, builds []*Build, ends ...End) error {
	if _, err := s.builds.add(builds, ends); err != nil {
		return fmt.Errorf("store end of build: %w", err)
	}
	if err := s.flushBuilds(); err != nil {
		return fmt.Errorf("store end of build: %w", err)
	}
	return nil
}

// NewBuild stores a record, durably, under a new id, which it sets.
func (s *Store) NewBuild(ctx context.Context, b *Build) (err error) {
	if b.ID, err = s.ReserveBuild(ctx); err != nil {
		return err
	}
	return s.EndBuild(ctx, []*Build{b})
}

// add makes changes pending, and says whether there are too many.
func (w *buildWrites) add(builds []*Build, ends []End) (full bool, err error) {
	list := make([]pendingBuild, len(builds))
	for i, b := range builds {
		rec, err := encodeJSON(b)
		if err != nil {
			return false, err
		}
		list[i] = pendingBuild{*b, rec}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pending == nil {
		w.pending = make(map[BuildID]pendingBuild)
	}
	for _, p := range list {
		w.pending[p.build.ID] = p
	}
	w.ends = append(w.ends, ends...)
	w.asked++
	return len(w.pending) >= maxPendingBuilds, nil
}

// flushBuildsIn has pending changes written after that long at the latest.
func (s *Store) flushBuildsIn(after time.Duration) {
	w := &s.builds
	w.mu.Lock()
	defer w.mu.Unlock()
	due := time.Now().Add(after)
	switch {
	case w.timer == nil:
		w.timer = time.AfterFunc(after, func() {
			// After Close, which wrote what was pending, there is nothing to do.
			if err := s.flushBuilds(); err != nil && databaseError(err) != ErrClosed {
				s.log.Error("write records of builds", "error", err)
				s.flushBuildsIn(time.Second)
			}
		})
	case due.Before(w.due):
		w.timer.Reset(after)
	default:
		return
	}
	w.due = due
}

// flushBuilds writes what is pending now. Those who come while others write are
// served together by the next.
func (s *Store) flushBuilds() error {
	w := &s.builds
	w.mu.Lock()
	asked, done := w.asked, w.done
	w.mu.Unlock()
	if asked == done {
		return nil
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	w.mu.Lock()
	done = w.done
	w.mu.Unlock()
	if done >= asked {
		return nil
	}
	if s.closed {
		return ErrClosed
	}
	return s.flushBuildsLocked(func(*bolt.Tx) error { return nil })
}

// flushBuildsLocked writes what is pending, and what f writes, in one
// transaction. It is called with commitMu held.
func (s *Store) flushBuildsLocked(f func(tx *bolt.Tx) error) error {
	w := &s.builds
	w.mu.Lock()
	builds, ends, runs, asked := w.pending, w.ends, w.runs, w.asked
	// Readers find these until they are in the database.
	list := slices.SortedFunc(maps.Values(builds), func(a, b pendingBuild) int { return int(int64(a.build.ID) - int64(b.build.ID)) })
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	w.mu.Unlock()
	err := s.updateLocked(func(tx *bolt.Tx) error {
		usage := make(usageChanges)
		for i := range list {
			if err := putBuild(tx, &list[i].build, list[i].rec, usage); err != nil {
				return err
			}
		}
		if err := usage.put(tx); err != nil {
			return err
		}
		for i := range ends {
			if err := putEnd(tx, &ends[i]); err != nil {
				return err
			}
		}
		for i := range runs {
			if err := putRun(tx, &runs[i]); err != nil {
				return err
			}
		}
		return f(tx)
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range list {
		id := list[i].build.ID
		if now, ok := w.pending[id]; ok && &now.rec[0] == &list[i].rec[0] {
			delete(w.pending, id)
		}
	}
	w.ends, w.runs = slices.Clone(w.ends[len(ends):]), slices.Clone(w.runs[len(runs):])
	w.done = asked
	return nil
}

// closeBuilds writes what is pending and gives back the ids that were not used.
func (s *Store) closeBuildsLocked(f func(tx *bolt.Tx) error) error {
	w := &s.builds
	w.idMu.Lock()
	defer w.idMu.Unlock()
	return s.flushBuildsLocked(func(tx *bolt.Tx) error {
		if w.next != 0 {
			if err := tx.Bucket(bucketBuilds).SetSequence(uint64(w.next) - 1); err != nil {
				return err
			}
		}
		return f(tx)
	})
}

// putBuild writes a build, what finds it, and adds what it changes of usage;
// rec is its encoding, nil to have it made.
func putBuild(tx *bolt.Tx, b *Build, rec []byte, usage usageChanges) error {
	k := idKey(uint64(b.ID))
	old, err := getBuild(tx, k)
	if err != nil && tx.Bucket(bucketBuilds).Get(k) != nil {
		return err
	}
	if err == nil {
		usage.add(old, -1)
	}
	usage.add(b, 1)
	if rec == nil {
		if rec, err = encodeJSON(b); err != nil {
			return err
		}
	}
	live := tx.Bucket(bucketLive)
	if b.ended() {
		err = live.Delete(k)
	} else {
		err = live.Put(k, nil)
	}
	if err != nil {
		return err
	}
	if err := tx.Bucket(bucketBuildIndex).Put(append(idKey(uint64(b.Account)), k...), b.indexed()); err != nil {
		return err
	}
	return tx.Bucket(bucketBuilds).Put(k, rec)
}
