package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"nbd/nixproto"
)

// UploadOptions say how an Upload treats what it is given. The zero value is
// an ordinary upload.
type UploadOptions struct {
	// Repair replaces the content of paths that are valid already, and blobs
	// whose bytes may be damaged.
	Repair bool
	// Verify, if not nil, is called for each path once its NAR is known to be
	// what info says, before it is added; an error refuses the path. It may
	// change info.Signatures.
	Verify func(info *nixproto.PathInfo) error
}

// An Upload brings paths into a view: Add for each, then Commit, which makes
// all of them durable and visible at once, and ends the upload. Until then its
// paths and what they refer to are leased; who goes on using them takes a lease
// of its own before. It is used by one goroutine; several uploads may go on at
// once.
type Upload struct {
	ctx   context.Context
	opts  UploadOptions
	b     *burst
	in    *ingest // used again for each path
	bytes uint64  // since the last Checkpoint
	ended bool
}

// errEnded is a mistake of the caller.
var errEnded = errors.New("upload has ended")

// NewUpload begins a burst of uploads into the account's view. The caller ends
// it with Commit or Abort.
func (s *Store) NewUpload(ctx context.Context, a AccountID, opts UploadOptions) (*Upload, error) {
	return s.newUpload(ctx, s.NewSight(a, Trust{}), opts)
}

func (s *Store) newUpload(ctx context.Context, v *Sight, opts UploadOptions) (*Upload, error) {
	if err := s.checkAccount(v.account); err != nil {
		return nil, err
	}
	u := &Upload{ctx: ctx, opts: opts, b: s.newBurst(v)}
	u.in = newIngest(s.NewCharge(v.account), nil)
	u.b.req.repair = opts.Repair
	return u, nil
}

// Add reads one NAR of exactly info.NarSize bytes from r, not a byte more, and
// adds the path to the upload. It is verified that the NAR is well-formed and
// has that size and hash, that path and content address recompute, that a
// derivation can be parsed, and that what info refers to is in the view or was
// added before (ErrInvalid), and that there is memory for what is known of it
// (ErrBusy). The registration time becomes the present.
//
// A path that the view has already keeps the content that it has, whatever
// arrives, as in Nix; its bytes are read and verified all the same, and Kept
// tells if they were others.
//
// After an error it is not known how many bytes were taken from r. If it was
// ErrInvalid, the upload can go on without the path.
//
// If r has the methods Peek, Discard and Ready of a nixproto.Source, they are
// used instead of Read, and nothing is copied.
func (u *Upload) Add(info *nixproto.PathInfo, r io.Reader) error {
	if u.ended {
		return errEnded
	}
	if err := u.ctx.Err(); err != nil {
		return err
	}
	if err := u.add(info, r); err != nil {
		return fmt.Errorf("add %s: %w", info.Path, err)
	}
	return nil
}

func (u *Upload) add(info *nixproto.PathInfo, r io.Reader) error {
	want, err := sumOf(info.NarHash)
	if err != nil {
		return err
	}
	if info.NarSize == 0 || info.NarSize > math.MaxInt64/4 {
		return fmt.Errorf("%w NAR size %d", ErrInvalid, info.NarSize)
	}
	rec := &record{PathInfo: *info}
	rec.References = slices.Compact(slices.Sorted(slices.Values(info.References)))
	rec.RegistrationTime = u.b.s.cfg.Now().Unix()
	lent, err := u.checkReferences(rec)
	if err != nil {
		return err
	}
	u.b.pin(want)
	old, err := u.known(rec, lent)
	if err != nil {
		return err
	}
	n := incoming{u: u, rec: rec, want: want, keep: old != nil}
	if err := n.receive(r); err != nil {
		return err
	}
	u.bytes += info.NarSize
	if old != nil {
		u.b.req.claimed = append(u.b.req.claimed, rec.Path)
	}
	switch {
	case old == nil:
		return u.b.addPath(rec, lent)
	case old.NarHash != rec.NarHash:
		u.b.kept = append(u.b.kept, rec.Path)
	}
	return nil
}

// known returns the record that a path is known to keep. For a small path it
// is not worth a look into the database, unless it would bring lent paths along;
// that comes with the commit.
func (u *Upload) known(rec *record, lent []*record) (*record, error) {
	if old := u.b.added[rec.Path]; old != nil || rec.NarSize <= smallNAR && len(lent) == 0 || u.opts.Repair {
		return old, nil
	}
	return u.b.s.lookupRecord(u.b.req.account, rec.Path)
}

// checkReferences leases the path with what it refers to, and checks that all
// of that is valid or lent. It returns the records of what is lent.
func (u *Upload) checkReferences(rec *record) (lent []*record, err error) {
	u.b.lease.Add(rec.Path)
	u.b.lease.Add(rec.References...)
	lent, missing, err := u.b.references(u.ctx, rec.References, func(p nixproto.StorePath) bool {
		return p == rec.Path || u.b.added[p] != nil
	})
	if err != nil {
		return nil, err
	}
	if missing != "" {
		return nil, fmt.Errorf("%w reference: %s is not valid", ErrInvalid, missing)
	}
	for _, l := range lent {
		if slices.Contains(l.References, rec.Path) {
			return nil, circular(rec.Path)
		}
	}
	if u.opts.Repair {
		return lent, u.checkCycle(rec)
	}
	return lent, nil
}

// circular is the error of a path that would refer to itself.
func circular(p nixproto.StorePath) error {
	return fmt.Errorf("%w references: %s would refer to itself by way of others", ErrInvalid, p)
}

// checkCycle refuses a repair that would make a path refer to itself by way of
// others.
func (u *Upload) checkCycle(rec *record) error {
	var refs []nixproto.StorePath
	for _, ref := range rec.References {
		if ref != rec.Path && u.b.added[ref] == nil {
			refs = append(refs, ref)
		}
	}
	closure, err := u.b.sight.Closure(u.ctx, refs)
	if err != nil {
		return err
	}
	if slices.Contains(closure, rec.Path) {
		return circular(rec.Path)
	}
	return nil
}

// Kept lists the paths whose content was another than the one in the view, and
// was dropped. The list is complete after Commit.
func (u *Upload) Kept() []nixproto.StorePath { return u.b.kept }

// Uncommitted returns how many bytes of NARs were read since the upload began
// or Checkpoint was called.
func (u *Upload) Uncommitted() uint64 { return u.bytes }

// Checkpoint makes durable and visible what was added so far; the upload goes
// on. A long burst calls it now and then, so that a lost connection does not
// lose all of it. After an error the upload can only be aborted.
func (u *Upload) Checkpoint() error {
	if u.ended {
		return errEnded
	}
	u.bytes = 0
	return u.b.commit()
}

// Commit makes durable and visible what was added, all at once, and ends the
// upload. After an error nothing of it is.
func (u *Upload) Commit() error {
	err := u.Checkpoint()
	u.Abort()
	return err
}

// Abort ends the upload and drops what was added since the last Checkpoint. It
// does nothing after Commit.
func (u *Upload) Abort() {
	if !u.ended {
		u.ended = true
		u.in.charge.Release()
		u.b.end()
	}
}

// ingest returns the upload's ingest, ready for another NAR.
func (u *Upload) ingest(to io.Writer) *ingest {
	u.in.reset(to)
	return u.in
}

// An incoming is one NAR of an upload while it is read.
type incoming struct {
	u    *Upload
	rec  *record
	want sum
	keep bool // the bytes are only verified
	// stored says that the blob is known to be there, damaged that its bytes
	// may not be although there is a record of it.
	stored, damaged bool
}

// receive reads the NAR, verifies it and adds its blob to the burst.
func (n *incoming) receive(r io.Reader) error {
	b := n.u.b
	if n.rec.NarSize <= smallNAR {
		n.stored, n.damaged = b.blobs[n.want], n.u.opts.Repair
		return n.receiveSmall(r)
	}
	if b.blobs[n.want] || n.keep {
		return n.take(n.u.ingest(io.Discard), r)
	}
	return n.receiveFile(r)
}

// receiveSmall reads a NAR into the frames of the burst.
func (n *incoming) receiveSmall(r io.Reader) error {
	b := n.u.b
	start := b.beginFrame()
	in := n.u.ingest((*frameWriter)(b))
	err := n.take(in, r)
	if err != nil || n.stored || n.keep {
		b.dropFrame(start)
		return err
	}
	return b.endFrame(start, n.want, in.parser.Index(), n.damaged)
}

// A frameWriter appends to the frames of a burst.
type frameWriter burst

func (w *frameWriter) Write(p []byte) (int, error) {
	w.req.frames = append(w.req.frames, p...)
	return len(p), nil
}

// receiveFile reads a NAR into a file of its own. Whether its bytes are stored
// already is looked up only when they have arrived: who claims a hash must not
// learn whether others have what it is of.
func (n *incoming) receiveFile(r io.Reader) error {
	b := n.u.b
	if err := b.s.room(int64(n.rec.NarSize)); err != nil {
		return err
	}
	f, err := b.s.newBlobFile()
	if err != nil {
		return err
	}
	in := n.u.ingest(f)
	err = n.take(in, r)
	if err == nil {
		n.stored, n.damaged, err = b.stored(n.want)
	}
	switch {
	case err != nil:
		f.drop()
		return err
	case n.stored && n.u.opts.Repair:
		n.damaged = true
	case n.stored:
		return b.addSpare(n.want, f)
	}
	return b.addFile(n.want, f, in.parser.Index(), n.damaged)
}

// take reads the NAR and compares it with what the record says of it.
func (n *incoming) take(in *ingest, r io.Reader) error {
	check, err := newContentCheck(n.rec)
	if err != nil {
		return err
	}
	in.check = check
	if err := copyNAR(in, r, n.rec.NarSize); err != nil {
		return err
	}
	h, err := in.finish()
	if err != nil {
		return err
	}
	if h != n.want {
		return fmt.Errorf("%w NAR hash: claimed %s, got %s", ErrInvalid, n.want.hash(), h.hash())
	}
	if err := check.finish(in.parser.Index()); err != nil {
		return err
	}
	if n.u.opts.Verify == nil {
		return nil
	}
	return n.u.opts.Verify(&n.rec.PathInfo)
}
