package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// How bytes go that nobody has:
//
//   - Sweep takes a picture of the database and notes the blobs that no view
//     has. From then on commits tell it (touchLocked) which blobs they name.
//   - With commits held up, it dooms those that still nobody has named or
//     pinned, and removes their records. From here on OpenBlob does not find
//     them.
//   - It unlinks their files, and lets go of those who want to store the same
//     bytes again (pins).
//   - A segment of which less than half is in use is copied to the end of the
//     last one and unlinked.

// A sweep is what commits tell a Sweep that is under way; guarded by commitMu.
type sweep struct {
	blobs    map[sum]bool
	segments map[uint64]bool // with new blobs
}

// touchLocked notes what a commit names.
func (s *Store) touchLocked(x *batch) {
	if s.sweep == nil {
		return
	}
	for i := range x.blobs {
		s.sweep.blobs[x.blobs[i].sum] = true
		s.sweep.segments[x.blobs[i].at.segment] = true
	}
	for _, p := range x.paths {
		if h, err := sumOf(p.rec.NarHash); err == nil {
			s.sweep.blobs[h] = true
		}
	}
}

// sweepBatch is how many blobs one transaction removes.
const sweepBatch = 500

// Sweep removes blobs that no view has, and old logs (Config.KeepLogs), and
// returns the bytes freed on disk. Uploads and downloads go on meanwhile.
func (s *Store) Sweep(ctx context.Context) (freed uint64, err error) {
	s.sweepMu.Lock()
	defer s.sweepMu.Unlock()
	if err := s.beginSweep(); err != nil {
		return 0, fmt.Errorf("sweep: %w", err)
	}
	defer func() {
		s.commitMu.Lock()
		defer s.commitMu.Unlock()
		s.sweep = nil
	}()
	freed, err = s.runSweep(ctx)
	if err != nil {
		return freed, fmt.Errorf("sweep: %w", err)
	}
	logs, err := s.sweepLogs(ctx)
	return freed + logs, err
}

// beginSweep brings the database up to date and makes commits tell what they
// name.
func (s *Store) beginSweep() error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if err := s.flushLocked(); err != nil {
		return err
	}
	s.sweep = &sweep{make(map[sum]bool), make(map[uint64]bool)}
	return nil
}

func (s *Store) runSweep(ctx context.Context) (freed uint64, err error) {
	unused, live, err := s.takePicture(ctx)
	if err != nil {
		return 0, err
	}
	for batch := range slices.Chunk(slices.SortedFunc(maps.Keys(unused), compareSums), sweepBatch) {
		n, err := s.removeBlobs(batch, unused, live)
		if freed += n; err != nil {
			return freed, err
		}
		if err := ctx.Err(); err != nil {
			return freed, err
		}
	}
	if err := s.removeStrays(); err != nil {
		return freed, err
	}
	n, err := s.compact(ctx, live)
	return freed + n, err
}

// takePicture returns the blobs that no view has, and the others that lie in
// segments by segment.
func (s *Store) takePicture(ctx context.Context) (unused map[sum]blobRecord, live map[uint64]map[sum]blobRecord, err error) {
	unused = make(map[sum]blobRecord)
	live = make(map[uint64]map[sum]blobRecord)
	err = s.db.View(func(tx *bolt.Tx) error {
		used, err := usedBlobs(ctx, tx)
		if err != nil {
			return err
		}
		return tx.Bucket(bucketBlobs).ForEach(func(k, b []byte) error {
			at, err := decodeBlobRecord(b)
			if err != nil {
				return err
			}
			h := sum(k)
			if !used[h] {
				unused[h] = at
			}
			if at.segment != 0 {
				if live[at.segment] == nil {
					live[at.segment] = make(map[sum]blobRecord)
				}
				live[at.segment][h] = at
			}
			return ctx.Err()
		})
	})
	return unused, live, databaseError(err)
}

// usedBlobs returns the blobs that views have.
func usedBlobs(ctx context.Context, tx *bolt.Tx) (map[sum]bool, error) {
	used := make(map[sum]bool)
	views := tx.Bucket(bucketViews)
	err := views.ForEachBucket(func(k []byte) error {
		return views.Bucket(k).Bucket(viewPaths).ForEach(func(_, rec []byte) error {
			h, err := recordSum(rec)
			used[h] = true
			return errors.Join(err, ctx.Err())
		})
	})
	return used, err
}

// removeBlobs removes blobs that are still unused.
func (s *Store) removeBlobs(batch []sum, at map[sum]blobRecord, live map[uint64]map[sum]blobRecord) (freed uint64, err error) {
	doomed, err := s.forget(batch)
	for _, h := range doomed {
		r := at[h]
		if err == nil && r.segment == 0 {
			if err = os.Remove(s.blobPath(h)); errors.Is(err, fs.ErrNotExist) {
				err = nil // it was damaged
			}
			freed += uint64(r.stored())
		}
		if err == nil {
			delete(live[r.segment], h)
		}
		s.pins.spare(h)
	}
	return freed, err
}

// forget removes the records of those of batch that are still unused, and
// returns these, doomed.
func (s *Store) forget(batch []sum) (doomed []sum, err error) {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	for _, h := range batch {
		if !s.sweep.blobs[h] && s.pins.doom(h) {
			doomed = append(doomed, h)
		}
	}
	return doomed, s.updateLocked(func(tx *bolt.Tx) error {
		for _, h := range doomed {
			if err := tx.Bucket(bucketBlobs).Delete(h[:]); err != nil {
				return err
			}
		}
		return nil
	})
}

// removeStrays removes files that failed commits left.
func (s *Store) removeStrays() error {
	s.straysMu.Lock()
	strays := slices.Collect(maps.Keys(s.strays))
	s.straysMu.Unlock()
	for _, h := range strays {
		if !s.pins.doom(h) { // a commit is under way
			continue
		}
		at, ok, err := s.lookupBlob(h)
		if err == nil && (!ok || at.segment != 0) {
			if err = os.Remove(s.blobPath(h)); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		}
		if err == nil {
			s.unstray(h)
		}
		s.pins.spare(h)
		if err != nil {
			return err
		}
	}
	return nil
}

// compact removes segments of which little or nothing is in use; live has the
// blobs in use when the picture was taken.
func (s *Store) compact(ctx context.Context, live map[uint64]map[sum]blobRecord) (freed uint64, err error) {
	ids, err := s.segs.list()
	if err != nil {
		return 0, err
	}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return freed, err
		}
		size, ok := s.segs.idle(id)
		if !ok {
			continue
		}
		var used int64
		for _, at := range live[id] {
			used += frameHead + padded(at.stored())
		}
		if used > size/2 {
			continue
		}
		if err := s.moveBlobs(live[id]); err != nil {
			s.log.Error("compact segment", "segment", id, "error", err)
			continue
		}
		ok, err := s.removeSegment(id)
		if err != nil {
			return freed, err
		}
		if ok {
			freed += uint64(size - used)
		}
	}
	return freed, nil
}

// moveBlobs copies blobs to the end of the last segment. Damaged ones stay, and
// are an error.
func (s *Store) moveBlobs(blobs map[sum]blobRecord) error {
	b := s.newBurst(s.NewSight(0, Trust{}))
	defer b.end()
	for _, h := range slices.SortedFunc(maps.Keys(blobs), compareSums) {
		blob, err := s.openBlob(h, blobs[h])
		if err != nil {
			return err
		}
		err = b.copyBlob(blob)
		if err = errors.Join(err, blob.Close()); err != nil {
			return err
		}
	}
	return b.commit()
}

// copyBlob adds a copy of a blob to a burst, to replace it.
func (b *burst) copyBlob(blob *Blob) error {
	x, err := blob.readIndex()
	if err != nil {
		return err
	}
	start := b.beginFrame()
	b.req.frames = append(b.req.frames, make([]byte, blob.at.size)...)
	nar := b.req.frames[start+frameHead:]
	if _, err := blob.ReadAt(nar, 0); err != nil {
		b.dropFrame(start)
		return err
	}
	if sha256.Sum256(nar) != blob.sum {
		b.dropFrame(start)
		return fmt.Errorf("blob %s: %w", blob.sum, ErrDamaged)
	}
	return b.endFrame(start, blob.sum, x, true)
}

// removeSegment removes a segment unless something was written to it, or
// something in it named, since the picture was taken.
func (s *Store) removeSegment(id uint64) (bool, error) {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.closed {
		return false, ErrClosed
	}
	if _, ok := s.segs.idle(id); !ok || s.sweep.segments[id] {
		return false, nil
	}
	if err := s.flushLocked(); err != nil {
		return false, err
	}
	return true, s.segs.remove(id)
}
