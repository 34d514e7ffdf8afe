package store

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// spillAt is how many bytes of small NARs a burst holds before it writes them
// to a segment.
const spillAt = 1 << 20

// maxOpenFiles is how many files a burst holds open before it syncs them.
const maxOpenFiles = 32

// A burst gathers paths and blobs for one commit. It is used by one goroutine.
type burst struct {
	s      *Store
	sight  *Sight // what paths may refer to
	lease  *Lease // on the paths and on what they refer to
	pinned []sum
	req    commitRequest
	charge *Charge // of known
	known  int64   // bytes that what is known of added takes
	added  map[nixproto.StorePath]*record
	blobs  map[sum]bool         // in req
	files  []placedFile         // not placed yet
	kept   []nixproto.StorePath // were valid with other content
	held   []uint64             // segments that frames were spilled to

	spilled int // of req.blobs, how many spill has dealt with
	open    int // files among the last ones that are not synced yet
}

// A placedFile is a blob that gets a file of its own.
type placedFile struct {
	sum  sum
	file *blobFile
	// spare says that the bytes are stored already. The file is written and
	// synced all the same: how long an upload takes must not tell what others
	// have.
	spare bool
}

// newBurst returns a burst into the own view of v's account.
func (s *Store) newBurst(v *Sight) *burst {
	a := v.account
	b := &burst{s: s, sight: v, lease: s.NewLease(a), charge: s.NewCharge(a), added: make(map[nixproto.StorePath]*record), blobs: make(map[sum]bool)}
	b.req.account = a
	return b
}

// pin keeps a blob until the burst ends.
func (b *burst) pin(h sum) {
	b.s.pins.pin(h)
	b.pinned = append(b.pinned, h)
}

// stored reports whether a pinned blob is stored, or in the burst already.
// damaged says that it should be, but its bytes are not there.
func (b *burst) stored(h sum) (ok, damaged bool, err error) {
	if b.blobs[h] {
		return true, false, nil
	}
	blob, err := b.s.openPinned(h)
	switch {
	case err == nil:
		return true, false, blob.Close()
	case errors.Is(err, ErrDamaged):
		return false, true, nil
	case errors.Is(err, ErrNotFound):
		return false, false, nil
	}
	return false, false, err
}

// pathMemory is what a path of a burst takes beside its record's strings: the
// record, its places in maps and lists, its blob, lease and pin.
const pathMemory = 1 << 10

// MaxSignatures is how many signatures a path has at most in a view: everybody
// who may trust them verifies them before he finds a good one.
const MaxSignatures = 64

// checkSignatures refuses a number of signatures.
func checkSignatures(n int) error {
	if n > MaxSignatures {
		return fmt.Errorf("%w number of signatures: %d, and a path has at most %d", ErrInvalid, n, MaxSignatures)
	}
	return nil
}

// addPath adds the record of a path, and of what it refers to and is only lent.
func (b *burst) addPath(r *record, lent []*record) error {
	if err := checkSignatures(len(r.Signatures)); err != nil {
		return err
	}
	for _, l := range lent {
		if err := b.count(l); err != nil {
			return err
		}
		b.req.adopted = append(b.req.adopted, l)
		b.added[l.Path] = l
	}
	if err := b.count(r); err != nil {
		return err
	}
	b.req.paths = append(b.req.paths, r)
	b.added[r.Path] = r
	return nil
}

// count counts the memory that a record takes.
func (b *burst) count(r *record) error {
	b.known += pathMemory + int64(len(r.References))*int64(len(r.Path)+pathMemory/16)
	for _, sig := range r.Signatures {
		b.known += int64(len(sig))
	}
	return b.charge.Set(b.known)
}

// beginFrame begins a frame for a small NAR, whose bytes are then appended to
// b.req.frames, and returns where the frame is.
func (b *burst) beginFrame() (start int) {
	if b.req.frames == nil {
		b.req.frames = (*framesPool.Get().(*[]byte))[:0]
	}
	start = len(b.req.frames)
	b.req.frames = append(b.req.frames, make([]byte, frameHead)...)
	return start
}

// framesPool holds buffers for the frames of a burst, which grow little beyond
// spillAt.
var framesPool = sync.Pool{New: func() any {
	b := make([]byte, 0, spillAt+2*smallNAR)
	return &b
}}

// dropFrame takes back what was appended since beginFrame.
func (b *burst) dropFrame(start int) { b.req.frames = b.req.frames[:start] }

// endFrame makes a blob of the NAR appended since beginFrame.
func (b *burst) endFrame(start int, h sum, x nar.Index, replace bool) error {
	size := len(b.req.frames) - start - frameHead
	frames, err := x.AppendBinary(b.req.frames)
	if err != nil {
		b.dropFrame(start)
		return fmt.Errorf("encode index: %w", err)
	}
	index := frames[start+frameHead+size:]
	var sums summer
	sums.add(frames[start+frameHead:][:size])
	at := blobRecord{segment: inFrames, offset: int64(start + frameHead), size: int64(size)}
	at.setTail(index, sums.finish())
	frames = append(frames, sums.done...)
	f := frame{kind: frameNAR, length: at.stored()}
	f.put(frames[start:])
	b.req.frames = append(frames, make([]byte, padded(f.length)-f.length)...)
	b.addBlob(newBlob{sum: h, at: at, replace: replace})
	if len(b.req.frames) < spillAt {
		return nil
	}
	return b.spill()
}

func (b *burst) addBlob(x newBlob) {
	b.req.blobs = append(b.req.blobs, x)
	b.blobs[x.sum] = true
}

// spill writes the frames to a segment, but for those of blobs that are stored
// already.
func (b *burst) spill() error {
	if err := b.s.room(int64(len(b.req.frames))); err != nil {
		return err
	}
	blobs, err := b.s.unknownBlobs(b.req.blobs[b.spilled:])
	if err != nil {
		return err
	}
	b.req.blobs = b.req.blobs[:b.spilled+len(blobs)]
	b.spilled = len(b.req.blobs)
	_, err = b.s.segs.append(func(at place) (pieces [][]byte, err error) {
		b.s.segs.hold(at.segment)
		b.held = append(b.held, at.segment)
		end := at.offset
		for i := range blobs {
			if r := &blobs[i].at; r.segment == inFrames {
				f := b.req.frames[r.offset-frameHead:][:frameHead+padded(r.stored())]
				pieces = appendPiece(pieces, f)
				r.segment, r.offset = at.segment, end+frameHead
				end += int64(len(f))
			}
		}
		return pieces, nil
	})
	b.req.frames = b.req.frames[:0]
	return err
}

// addFile adds a blob with a file of its own, which becomes the burst's.
func (b *burst) addFile(h sum, f *blobFile, x nar.Index, replace bool) error {
	at, err := f.finish(x)
	if err != nil {
		f.drop()
		return err
	}
	b.addBlob(newBlob{sum: h, at: at, replace: replace})
	return b.keepFile(placedFile{sum: h, file: f})
}

// addSpare adds a file whose bytes are stored already.
func (b *burst) addSpare(h sum, f *blobFile) error {
	return b.keepFile(placedFile{sum: h, file: f, spare: true})
}

func (b *burst) keepFile(p placedFile) error {
	p.file.startWriteback()
	b.files = append(b.files, p)
	if b.open++; b.open < maxOpenFiles {
		return nil
	}
	return b.syncFiles()
}

// syncFiles syncs the files that are not synced yet, all at the same time: the
// file system makes one transaction of them.
func (b *burst) syncFiles() error {
	files := b.files[len(b.files)-b.open:]
	b.open = 0
	errs := make([]error, len(files))
	var wg sync.WaitGroup
	for i, f := range files {
		wg.Go(func() { errs[i] = f.file.sync() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// sync makes the bytes of the file durable and closes it.
func (b *blobFile) sync() error {
	if err := errors.Join(unix.Fsync(int(b.f.Fd())), b.f.Close()); err != nil {
		return fmt.Errorf("sync blob: %w", diskError(err))
	}
	return nil
}

// placeFiles moves the files to their names, and makes those durable.
func (b *burst) placeFiles() error {
	if err := b.syncFiles(); err != nil {
		return err
	}
	dirs := make(map[string]bool)
	for _, f := range b.files {
		if f.spare {
			f.file.drop()
			continue
		}
		if err := f.file.place(f.sum); err != nil {
			return err
		}
		b.s.stray(f.sum)
		dirs[filepath.Dir(b.s.blobPath(f.sum))] = true
	}
	errs := make(chan error, len(dirs))
	for dir := range dirs {
		go func() { errs <- syncDir(dir) }()
	}
	var failed error
	for range len(dirs) {
		if err := <-errs; err != nil {
			failed = fmt.Errorf("sync directory of blobs: %w", diskError(err))
		}
	}
	return failed
}

// commit makes what was added durable and visible, and empties the burst.
// After an error nothing of it is, and the burst is of no use.
func (b *burst) commit() error {
	if len(b.req.paths) == 0 && len(b.req.blobs) == 0 {
		return nil
	}
	if err := b.s.room(int64(len(b.req.frames))); err != nil {
		return err
	}
	if err := b.placeFiles(); err != nil {
		return err
	}
	if err := b.hashClosures(); err != nil {
		return err
	}
	req := b.req
	if err := b.s.commit(&req); err != nil {
		return err
	}
	b.kept = append(b.kept, req.kept...)
	for _, f := range b.files {
		if !f.spare {
			b.s.unstray(f.sum)
		}
	}
	b.files = b.files[:0]
	b.req = commitRequest{account: b.req.account, repair: b.req.repair, frames: b.req.frames[:0]}
	b.spilled, b.known = 0, 0
	b.charge.Release()
	clear(b.added)
	clear(b.blobs)
	return nil
}

// end drops what was not committed.
func (b *burst) end() {
	for _, f := range b.files {
		f.file.drop()
	}
	for _, h := range b.pinned {
		b.s.pins.unpin(h)
	}
	for _, id := range b.held {
		b.s.segs.unhold(id)
	}
	b.lease.Release()
	b.charge.Release()
	if frames := b.req.frames; frames != nil {
		framesPool.Put(&frames)
	}
	b.files, b.pinned, b.held, b.req.frames = nil, nil, nil, nil
}

// stray remembers a file in blobs that no record names yet.
func (s *Store) stray(h sum) {
	s.straysMu.Lock()
	defer s.straysMu.Unlock()
	s.strays[h] = true
}

// unstray forgets a file that a record names now.
func (s *Store) unstray(h sum) {
	s.straysMu.Lock()
	defer s.straysMu.Unlock()
	delete(s.strays, h)
}
