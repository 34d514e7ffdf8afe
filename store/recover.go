package store

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	bolt "go.etcd.io/bbolt"
)

// recover brings the directory into the state that the rest of the package
// takes for granted: the commits in the segments are known, the segments end
// behind what is in use, nothing is in tmp, no build runs. After a crash it
// also removes blobs that nothing names.
func (s *Store) recover() error {
	if err := s.makeDirs(); err != nil {
		return err
	}
	if err := s.emptyTmp(); err != nil {
		return fmt.Errorf("empty tmp: %w", err)
	}
	var clean bool
	var done place
	err := s.db.Update(func(tx *bolt.Tx) (err error) {
		if err := initSchema(tx); err != nil {
			return err
		}
		settings, err := loadSettings(tx)
		if err != nil {
			return err
		}
		s.settings.Store(settings)
		meta := tx.Bucket(bucketMeta)
		clean = meta.Get(metaClean) != nil
		if done, err = checkpoint(tx); err != nil {
			return err
		}
		if err := endBuilds(tx, s.cfg.Now()); err != nil {
			return err
		}
		return meta.Delete(metaClean)
	})
	if err != nil {
		return databaseError(err)
	}
	if err := s.replay(done); err != nil {
		return fmt.Errorf("read commits from segments: %w", err)
	}
	if err := s.flushLocked(); err != nil {
		// All is known, in memory; a full disk must not keep it from being
		// read or deleted.
		s.log.Error("write recovered commits to the database", "error", err)
		for k := range s.pending.paths { // it may replace what is there
			s.pending.replaced[k.account] = true
		}
	}
	s.openIndex()
	if clean {
		return nil
	}
	if err := s.removeUnnamed(); err != nil {
		return fmt.Errorf("remove unnamed files: %w", err)
	}
	return nil
}

// makeDirs makes the directories and syncs those that hold them.
func (s *Store) makeDirs() error {
	if _, err := os.Stat(filepath.Join(s.dir, "blobs", "ff")); err == nil {
		return nil
	}
	dirs := []string{"tmp", "segments", "logs", "drvlogs", "blobs"}
	for i := range 256 {
		dirs = append(dirs, filepath.Join("blobs", hex.EncodeToString([]byte{byte(i)})))
	}
	for _, d := range dirs {
		if err := os.Mkdir(filepath.Join(s.dir, d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return errors.Join(syncDir(filepath.Join(s.dir, "blobs")), syncDir(s.dir), syncDir(filepath.Dir(s.dir)))
}

// emptyTmp removes what was being received.
func (s *Store) emptyTmp() error {
	entries, err := os.ReadDir(filepath.Join(s.dir, "tmp"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(s.dir, "tmp", e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// replay makes pending what was committed behind the checkpoint, cuts off what
// belongs to no commit, and opens the last segment.
func (s *Store) replay(done place) error {
	ids, err := s.segs.list()
	if err != nil {
		return err
	}
	s.segs.mu.Lock()
	defer s.segs.mu.Unlock()
	ends := make(map[uint64]int64)
	ends[done.segment] = done.offset
	for i, id := range ids {
		if id < done.segment && i < len(ids)-1 {
			continue
		}
		seg, err := s.segs.openLocked(id)
		if err != nil {
			return err
		}
		s.segs.last = seg
		if id < done.segment { // the ones behind it were removed
			continue
		}
		if err := s.replaySegment(seg, ends); err != nil {
			return err
		}
	}
	s.pendingCount.Store(int64(s.pending.count()))
	for _, id := range ids {
		if seg := s.segs.open[id]; seg != nil && id >= done.segment && seg.size > ends[id] {
			if err := seg.f.Truncate(ends[id]); err != nil {
				return err
			}
			seg.size = ends[id]
		}
	}
	return nil
}

// replaySegment makes pending the commits of a segment from ends[seg.id] on.
// It stops at the first bytes that are no frame: a crash left them, and
// nothing behind them was acknowledged. ends is kept up to date with how far
// each segment is in use.
func (s *Store) replaySegment(seg *segment, ends map[uint64]int64) error {
	head := make([]byte, frameHead)
	for off := ends[seg.id]; seg.size-off >= frameHead; {
		if _, err := seg.f.ReadAt(head, off); err != nil {
			return err
		}
		f, ok := parseFrame(head, seg.size-off)
		if !ok {
			return nil
		}
		if f.kind == frameCommit {
			ok, err := s.replayCommit(seg, off, f, ends)
			if err != nil {
				return err
			}
			if !ok {
				return nil
			}
			s.pending.end = place{seg.id, off + f.size()}
			ends[seg.id] = max(ends[seg.id], off+f.size())
		}
		off += f.size()
	}
	return nil
}

// replayCommit makes one commit pending. ok is false if it, or a NAR that it
// names, did not reach the disk.
func (s *Store) replayCommit(seg *segment, off int64, f frame, ends map[uint64]int64) (ok bool, err error) {
	payload := make([]byte, f.length)
	if _, err := seg.f.ReadAt(payload, off+frameHead); err != nil {
		return false, err
	}
	if crc32.Checksum(payload, castagnoli) != f.crc {
		return false, nil
	}
	x, err := decodeBatch(payload)
	if err != nil { // the checksum is right: written by a newer nbd, or damaged
		return false, fmt.Errorf("segment %d at %d: %w", seg.id, off, err)
	}
	for i := range x.blobs {
		if ok, err := s.reached(&x.blobs[i]); !ok || err != nil {
			return false, err
		}
	}
	for i := range x.blobs {
		if at := &x.blobs[i].at; at.segment != 0 {
			ends[at.segment] = max(ends[at.segment], padded(at.offset+at.stored()))
		}
	}
	s.pending.add(*x, place{}, s.publicNames)
	return true, nil
}

// reached reports whether all bytes of a blob reached the disk. Within a
// segment nothing says in which order they did.
func (s *Store) reached(b *batchBlob) (bool, error) {
	if b.at.segment == 0 {
		fi, err := os.Stat(s.blobPath(b.sum))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil && fi.Size() == b.at.stored(), err
	}
	seg, err := s.segs.openLocked(b.at.segment)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(seg.f, b.at.offset, b.at.size)); err != nil {
		return false, err
	}
	tail := make([]byte, b.at.stored()-b.at.size)
	if _, err := seg.f.ReadAt(tail, b.at.offset+b.at.size); err != nil && err != io.EOF {
		return false, err
	}
	index, sums := tail[:b.at.indexLen], tail[b.at.indexLen:]
	return sum(h.Sum(nil)) == b.sum && crc32.Checksum(index, castagnoli) == b.at.indexCRC &&
		crc32.Checksum(sums, castagnoli) == b.at.sumsCRC, nil
}

// removeUnnamed removes the files of blobs that have no record, and what
// removed accounts left.
func (s *Store) removeUnnamed() error {
	dirs, err := os.ReadDir(filepath.Join(s.dir, "blobs"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		entries, err := os.ReadDir(filepath.Join(s.dir, "blobs", d.Name()))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := s.removeIfUnnamed(d.Name(), e.Name()); err != nil {
				return err
			}
		}
	}
	return s.removeStrangeLogs()
}

// removeIfUnnamed removes a file in blobs that is not the blob it is named
// after.
func (s *Store) removeIfUnnamed(dir, name string) error {
	var h sum
	if b, err := hex.DecodeString(name); err == nil && len(b) == len(h) && name[:2] == dir {
		copy(h[:], b)
		at, ok, err := s.lookupBlob(h)
		if err != nil {
			return err
		}
		if ok && at.segment == 0 {
			return nil
		}
	}
	return os.Remove(filepath.Join(s.dir, "blobs", dir, name))
}

// removeStrangeLogs removes uploaded logs of accounts that are not there.
func (s *Store) removeStrangeLogs() error {
	entries, err := os.ReadDir(filepath.Join(s.dir, "drvlogs"))
	if err != nil {
		return err
	}
	return s.db.View(func(tx *bolt.Tx) error {
		for _, e := range entries {
			id, err := strconv.ParseUint(e.Name(), 10, 64)
			if err == nil {
				if _, err = openView(tx, AccountID(id)); err == nil {
					continue
				}
			}
			if err := os.RemoveAll(filepath.Join(s.dir, "drvlogs", e.Name())); err != nil {
				return err
			}
		}
		return nil
	})
}
