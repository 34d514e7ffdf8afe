package store

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// How a path becomes valid:
//
//	Commit, Register     the blobs are in segments or placed as files
//	   │
//	commit               waits for its turn with others; the one whose turn it
//	   │                 is takes all that wait with it
//	commitGroup          decides, writes one frame to the segment, syncs it
//	   │
//	pending              the commit is durable and visible, and acknowledged
//	   │
//	flush                some time later, many commits at once: into the
//	                     database, with the checkpoint that ends them
//
// A transaction of bbolt costs two syncs and copies of all pages on the way to
// each key, whatever it changes; with one for each path, as the serve protocol
// would have it, that is the largest part of an upload (BenchmarkCommitOne).
//
// What is pending is read by Info and Valid, and by lookupBlob; all other
// readers and all writers of the database flush first.

// flushAfter is how long a commit may be pending.
const flushAfter = 500 * time.Millisecond

// flushAt is how many paths and blobs may be pending before those who commit
// wait for a flush.
const flushAt = 8192

// pending is what was committed and is not in the database yet.
type pending struct {
	end   place // behind the last commit
	paths map[viewPath]*record
	blobs map[sum]blobRecord
	// signed are the accounts that a path is pending for with a signature in
	// the name of a public key.
	signed map[nixproto.StorePath][]AccountID
	// replaced are the accounts of which a path gets other content than it had
	// in the database or while it was pending.
	replaced map[AccountID]bool
}

// A viewPath is a path in a view.
type viewPath struct {
	account AccountID
	path    nixproto.StorePath
}

// add puts a commit that ends at end behind the others. public are the names
// of public keys.
func (p *pending) add(x batch, end place, public map[string]bool) {
	if p.paths == nil {
		p.paths = make(map[viewPath]*record)
		p.blobs = make(map[sum]blobRecord)
		p.signed = make(map[nixproto.StorePath][]AccountID)
		p.replaced = make(map[AccountID]bool)
	}
	for _, a := range x.replaced {
		p.replaced[a] = true
	}
	for i := range x.blobs {
		p.blobs[x.blobs[i].sum] = x.blobs[i].at
	}
	for _, b := range x.paths {
		k := viewPath{b.account, b.rec.Path}
		if old := p.paths[k]; old != nil && !old.sameContent(b.rec) {
			p.replaced[b.account] = true
		}
		p.paths[k] = b.rec
		if len(signers(b.rec, public)) > 0 {
			p.signed[b.rec.Path] = append(p.signed[b.rec.Path], b.account)
		}
	}
	p.end = end
}

// count returns how many paths and blobs are pending.
func (p *pending) count() int { return len(p.paths) + len(p.blobs) }

// apply writes what is pending to the database. It goes by sorted keys, which
// spares bbolt moving what it has put into a page before.
func (p *pending) apply(tx *bolt.Tx, s *Store) error {
	if p.count() == 0 {
		return nil
	}
	blobs := tx.Bucket(bucketBlobs)
	for _, h := range slices.SortedFunc(maps.Keys(p.blobs), compareSums) {
		at := p.blobs[h]
		if err := blobs.Put(h[:], appendBlobRecord(nil, &at)); err != nil {
			return err
		}
	}
	var v *view
	for _, k := range slices.SortedFunc(maps.Keys(p.paths), compareViewPaths) {
		if v == nil || v.account != k.account {
			var err error
			if v, err = s.writeView(tx, k.account); err != nil {
				return err
			}
			if p.replaced[k.account] {
				if err := v.nextEpoch(); err != nil {
					return err
				}
			}
		}
		if err := v.put(p.paths[k]); err != nil {
			return err
		}
	}
	return putCheckpoint(tx, p.end)
}

func compareSums(a, b sum) int { return bytes.Compare(a[:], b[:]) }

func compareViewPaths(a, b viewPath) int {
	return cmp.Or(cmp.Compare(a.account, b.account), cmp.Compare(a.path, b.path))
}

// A commitRequest asks that paths become valid. Its blobs are pinned, and what
// the paths refer to is leased, until it is done.
type commitRequest struct {
	account AccountID // of the paths; 0 if there are none
	paths   []*record
	repair  bool // over records that are there
	// adopted are records of lent paths, each after those it refers to, that
	// become valid with those of paths that refer to them.
	adopted []*record
	// claimed are paths that were brought and have a record already, perhaps
	// one of adopted, which then is adopted for their sake.
	claimed []nixproto.StorePath
	blobs   []newBlob
	frames  []byte // NAR frames that are not in a segment yet
	// kept are the paths that were valid already with other content; set by
	// commit.
	kept []nixproto.StorePath
	done bool
	err  error
}

// A newBlob is a blob that a request brings; it may be stored already.
type newBlob struct {
	sum sum
	// at is where it is. If at.segment is inFrames, at.offset counts from the
	// beginning of the request's frames.
	at blobRecord
	// replace writes the blob's record over one whose bytes are damaged.
	replace bool
}

// inFrames stands for the number of a segment that is not known yet.
const inFrames = math.MaxUint64

// commit makes r durable and visible.
func (s *Store) commit(r *commitRequest) error {
	s.queueMu.Lock()
	s.queue = append(s.queue, r)
	s.queueMu.Unlock()

	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if r.done {
		return r.err
	}
	s.queueMu.Lock()
	group := s.queue
	s.queue = nil
	s.queueMu.Unlock()
	err := s.commitGroupLocked(group)
	for _, r := range group {
		r.done = true
		if err != nil {
			r.err = err
		}
	}
	return r.err
}

// commitGroupLocked commits all of group with one sync. Requests that cannot
// be are given an error of their own.
func (s *Store) commitGroupLocked(group []*commitRequest) error {
	if s.closed {
		return ErrClosed
	}
	x, owners, err := s.decideLocked(group)
	if err != nil {
		return err
	}
	if len(x.paths) == 0 && len(x.blobs) == 0 {
		return nil
	}
	end, err := s.writeCommit(x, owners)
	if err != nil {
		return err
	}
	s.pendingMu.Lock()
	s.pending.add(*x, end, s.publicNames)
	count := s.pending.count()
	s.pendingMu.Unlock()
	s.pendingCount.Store(int64(count))
	s.touchLocked(x)
	s.noteLocked(x)
	if count >= flushAt {
		if err := s.flushLocked(); err != nil { // stays pending, and durable
			s.log.Error("write pending commits to the database", "error", err)
		}
		return nil
	}
	select {
	case s.flushWake <- struct{}{}:
	default:
	}
	return nil
}

// A decision is what a group of requests changes.
type decision struct {
	s     *Store
	x     *batch
	paths map[viewPath]*record // in x
}

// decideLocked returns what changes: paths that are not in their view yet or
// are to be repaired, and blobs that are not stored yet, with the requests that
// bring them.
func (s *Store) decideLocked(group []*commitRequest) (x *batch, owners []*commitRequest, err error) {
	x = &batch{}
	d := &decision{s: s, x: x, paths: make(map[viewPath]*record)}
	blobs := make(map[sum]bool)
	err = s.db.View(func(tx *bolt.Tx) error {
		known := tx.Bucket(bucketBlobs)
		for _, r := range group {
			v, err := openView(tx, r.account)
			if err != nil && len(r.paths) > 0 { // removed while the upload was under way
				r.err = err
				continue
			}
			if r.err = s.lostBlobs(r); r.err != nil {
				continue
			}
			for i := range r.blobs {
				b := &r.blobs[i]
				_, ok := s.pending.blobs[b.sum]
				if blobs[b.sum] || (ok || known.Get(b.sum[:]) != nil) && !b.replace {
					continue
				}
				blobs[b.sum] = true
				x.blobs = append(x.blobs, batchBlob{b.sum, b.at})
				owners = append(owners, r)
			}
			if err := d.request(r, v); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("commit: %w", databaseError(err))
	}
	return x, owners, nil
}

// request decides what becomes of the paths of one request, whose view is v.
func (d *decision) request(r *commitRequest, v *view) error {
	begin := len(d.x.paths)
	settled := true // no path keeps other content than the request has for it
	for _, rec := range r.paths {
		old, err := d.known(v, rec.Path)
		if err != nil {
			return err
		}
		k := viewPath{r.account, rec.Path}
		if old != nil && (!r.repair || d.paths[k] != nil) {
			if old.NarHash != rec.NarHash {
				r.kept = append(r.kept, rec.Path)
			}
			settled = settled && old.sameContent(rec)
			continue
		}
		if old != nil && !old.sameContent(rec) {
			d.x.replaced = append(d.x.replaced, r.account)
		}
		d.paths[k] = rec
		d.x.paths = append(d.x.paths, batchPath{r.account, rec})
	}
	if len(r.adopted) > 0 {
		same, err := d.adopt(r, v, d.x.paths[begin:])
		if err != nil {
			return err
		}
		settled = settled && same
	}
	if !settled {
		// Their closure hashes were computed from what did not come to be.
		for _, p := range d.x.paths[begin:] {
			p.rec.closure = sum{}
		}
	}
	return nil
}

// known returns the record that a path of the view has, or gets by an earlier
// request.
func (d *decision) known(v *view, p nixproto.StorePath) (*record, error) {
	k := viewPath{v.account, p}
	if old := cmp.Or(d.paths[k], d.s.pending.paths[k]); old != nil {
		return old, nil
	}
	return v.get(p)
}

// adopt lets lent paths become valid that paths refer to, directly or not. same
// is false if the view has another content for one of them meanwhile.
func (d *decision) adopt(r *commitRequest, v *view, paths []batchPath) (same bool, err error) {
	same = true
	wanted := make(map[nixproto.StorePath]bool)
	for _, p := range r.claimed {
		wanted[p] = true
	}
	for _, p := range paths {
		for _, ref := range p.rec.References {
			wanted[ref] = true
		}
	}
	for _, rec := range slices.Backward(r.adopted) {
		if !wanted[rec.Path] {
			continue
		}
		old, err := d.known(v, rec.Path)
		if err != nil {
			return false, err
		}
		if old != nil { // with its closure
			same = same && old.sameContent(rec)
			continue
		}
		for _, ref := range rec.References {
			wanted[ref] = true
		}
		d.paths[viewPath{r.account, rec.Path}] = rec
		d.x.paths = append(d.x.paths, batchPath{r.account, rec})
	}
	return same, nil
}

// lostBlobs returns an error if a segment with one of r's blobs could not be
// synced.
func (s *Store) lostBlobs(r *commitRequest) error {
	var last uint64
	for i := range r.blobs {
		id := r.blobs[i].at.segment
		if id != 0 && id != inFrames && id != last && s.segs.lost(id) {
			return fmt.Errorf("commit: segment %d could not be written", id)
		}
		last = id
	}
	return nil
}

// writeCommit writes the frames of the blobs in x and the one of the commit to
// a segment and syncs it. It returns where the commit ends.
func (s *Store) writeCommit(x *batch, owners []*commitRequest) (end place, err error) {
	var length int64
	at, err := s.segs.appendDurably(func(at place) ([][]byte, error) {
		var pieces [][]byte
		for i, r := range owners {
			b := &x.blobs[i].at
			if b.segment != inFrames {
				continue
			}
			f := r.frames[b.offset-frameHead:][:frameHead+padded(b.stored())]
			pieces = appendPiece(pieces, f)
			b.segment, b.offset = at.segment, at.offset+length+frameHead
			length += int64(len(f))
		}
		f, err := commitFrame(x)
		length += int64(len(f))
		return append(pieces, f), err
	})
	if err != nil {
		return place{}, err
	}
	return place{at.segment, at.offset + length}, nil
}

// appendPiece appends p to pieces, as one with the last piece if p lies behind
// it in memory.
func appendPiece(pieces [][]byte, p []byte) [][]byte {
	if n := len(pieces); n > 0 {
		last := pieces[n-1]
		if cap(last)-len(last) >= len(p) && &last[:len(last)+1][len(last)] == &p[0] {
			pieces[n-1] = last[:len(last)+len(p)]
			return pieces
		}
	}
	return append(pieces, p)
}

// flush brings the database up to date.
func (s *Store) flush() error {
	if s.pendingCount.Load() == 0 {
		return nil
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	return s.flushLocked()
}

func (s *Store) flushLocked() error {
	if s.pending.count() == 0 {
		return nil
	}
	return s.updateLocked(func(*bolt.Tx) error { return nil })
}

// update runs f in a transaction of a database that is up to date. Nothing is
// committed and no other update runs meanwhile.
func (s *Store) update(f func(tx *bolt.Tx) error) error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.closed {
		return ErrClosed
	}
	return s.updateLocked(f)
}

func (s *Store) updateLocked(f func(tx *bolt.Tx) error) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		if err := s.pending.apply(tx, s); err != nil {
			return fmt.Errorf("write pending commits: %w", err)
		}
		return f(tx)
	})
	if err != nil {
		return databaseError(err)
	}
	s.pendingMu.Lock()
	if s.pending.count() > 0 {
		s.flushes.Add(1)
	}
	s.pending = pending{}
	s.pendingMu.Unlock()
	s.pendingCount.Store(0)
	return nil
}

// read runs f in a read transaction of a database that is up to date.
func (s *Store) read(f func(tx *bolt.Tx) error) error {
	if err := s.flush(); err != nil {
		return err
	}
	return databaseError(s.db.View(f))
}

// flusher flushes what was pending for a while, until the store is closed.
func (s *Store) flusher() {
	defer s.background.Done()
	for {
		select {
		case <-s.closing:
			return
		case <-s.flushWake:
		}
		select {
		case <-s.closing:
			return
		case <-time.After(s.flushAfter):
		}
		if err := s.flush(); err != nil {
			s.log.Error("write pending commits to the database", "error", err)
		}
	}
}

// lookupRecord returns the record of a path in a view; nil if there is none.
func (s *Store) lookupRecord(a AccountID, p nixproto.StorePath) (r *record, err error) {
	if r := s.pendingRecord(a, p); r != nil {
		return r, nil
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return nil // not there and not yours are one answer
		}
		r, err = v.get(p)
		return err
	})
	return r, databaseError(err)
}

// pendingRecord returns the record of a path if it is pending.
func (s *Store) pendingRecord(a AccountID, p nixproto.StorePath) *record {
	if s.pendingCount.Load() == 0 {
		return nil
	}
	s.pendingMu.RLock()
	defer s.pendingMu.RUnlock()
	return s.pending.paths[viewPath{a, p}]
}

// pendingSigned returns the accounts that a path is pending for with a signature
// in the name of a public key.
func (s *Store) pendingSigned(p nixproto.StorePath) []AccountID {
	if s.pendingCount.Load() == 0 {
		return nil
	}
	s.pendingMu.RLock()
	defer s.pendingMu.RUnlock()
	return slices.Clone(s.pending.signed[p])
}

// missing returns the first of paths that is not in the view; "" if all are.
func (s *Store) missing(a AccountID, paths []nixproto.StorePath) (missing nixproto.StorePath, err error) {
	left := make([]nixproto.StorePath, 0, len(paths))
	for _, p := range paths {
		if s.pendingRecord(a, p) == nil {
			left = append(left, p)
		}
	}
	if len(left) == 0 {
		return "", nil
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(left, func(p nixproto.StorePath) bool { return !v.has(p) }); i >= 0 {
			missing = left[i]
		}
		return nil
	})
	return missing, databaseError(err)
}

// unknownBlobs returns those of blobs that are not stored, in the memory of
// blobs.
func (s *Store) unknownBlobs(blobs []newBlob) (unknown []newBlob, err error) {
	s.pendingMu.RLock()
	unknown = slices.DeleteFunc(blobs, func(b newBlob) bool {
		_, ok := s.pending.blobs[b.sum]
		return ok && !b.replace
	})
	s.pendingMu.RUnlock()
	err = s.db.View(func(tx *bolt.Tx) error {
		known := tx.Bucket(bucketBlobs)
		unknown = slices.DeleteFunc(unknown, func(b newBlob) bool {
			return !b.replace && known.Get(b.sum[:]) != nil
		})
		return nil
	})
	return unknown, databaseError(err)
}

// lookupBlob returns where the blob h is.
func (s *Store) lookupBlob(h sum) (at blobRecord, ok bool, err error) {
	if s.pendingCount.Load() > 0 {
		s.pendingMu.RLock()
		at, ok = s.pending.blobs[h]
		s.pendingMu.RUnlock()
		if ok {
			return at, true, nil
		}
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketBlobs).Get(h[:])
		if ok = b != nil; !ok {
			return nil
		}
		at, err = decodeBlobRecord(b)
		return err
	})
	return at, ok, databaseError(err)
}
