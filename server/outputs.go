package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/reuse"
	"nbd/store"
)

// An outputError says that a build is refused for what its outputs are. It is
// the build's own fault, and would happen again.
type outputError struct {
	code nixproto.BuildStatus
	msg  string // for the client
}

func (e *outputError) Error() string { return e.msg }

// rejectf makes an outputError.
func rejectf(format string, args ...any) error {
	return &outputError{nixproto.OutputRejected, fmt.Sprintf(format, args...)}
}

// A settled is an output whose path is final, ready to be registered.
type settled struct {
	name   string
	info   nixproto.PathInfo
	staged *producedOutput
	old    bool // it was valid before, and stays as it is
}

// finish turns what a run produced into valid outputs: it finds their final
// paths and references, applies the derivation's checks, and registers them for
// one of those who wait, all at once; their contents are held in the ending.
// In nixproto.BuildCheck it compares them instead. What is the build's fault is
// an *outputError.
func (b *Builds) finish(ctx context.Context, f *flight, a *attempt, p *produced) (*ending, error) {
	j := a.job
	if missing := p.missing(); len(missing) > 0 {
		return nil, rejectf("builder for '%s' failed to produce output '%s'", j.drvPath, missing[0])
	}
	outs, err := b.settle(ctx, j, p)
	if err != nil {
		return nil, err
	}
	if err := checkOutputs(j, a.closure, outs); err != nil {
		return nil, err
	}
	end := &ending{status: reuse.Built, code: nixproto.Built, drvPath: j.drvPath, paths: make(map[string]nixproto.StorePath, len(outs))}
	results := make(map[string]store.ResultOutput, len(outs))
	staged := make(map[string]*store.Staged, len(outs))
	var hashes []nixproto.Hash
	for _, out := range outs {
		info := &out.info
		end.paths[out.name] = info.Path
		results[out.name] = store.ResultOutput{Path: info.Path, NarHash: info.NarHash, NarSize: info.NarSize, References: info.References, CA: info.CA}
		staged[out.name] = out.staged.staged
		hashes = append(hashes, info.NarHash)
		a.lease.Add(info.Path)
	}
	end.outputs = recorded(results)
	a.mu.Lock()
	owner := a.owner
	a.mu.Unlock()
	switch j.mode {
	case nixproto.BuildCheck:
		return end, b.compare(ctx, owner.session, j, outs)
	case nixproto.BuildRepair:
		return end, b.replace(ctx, owner.session, j, results, staged)
	}
	first, refused, err := b.registrar(ctx, f, owner, results)
	if err != nil || refused != nil {
		return refused, err
	}
	if end.hold, err = b.store.Hold(hashes...); err != nil {
		return nil, err
	}
	end.results = results
	// The bytes become the server's with the paths of one account; from then on
	// they can be granted to others.
	if err := b.registerOutputs(ctx, first.session, first.job, results, nil, staged); err != nil {
		end.release()
		return nil, err
	}
	return end, nil
}

// settle finds the final path of each output, siblings that it refers to first.
func (b *Builds) settle(ctx context.Context, j *job, p *produced) ([]*settled, error) {
	order, err := p.inOrder(j.drvPath)
	if err != nil {
		return nil, err
	}
	kind, err := j.drv.Kind()
	if err != nil {
		return nil, err
	}
	final := make(map[nixproto.StorePath]nixproto.StorePath) // by path as seen, where it is another
	var outs []*settled
	for _, o := range order {
		out, err := b.settleOne(ctx, j, kind, o, final)
		if err != nil {
			return nil, err
		}
		if o.seen != out.info.Path {
			final[o.seen] = out.info.Path
		}
		outs = append(outs, out)
	}
	return outs, nil
}

func (b *Builds) settleOne(ctx context.Context, j *job, kind nixproto.DerivationKind, o *producedOutput, final map[nixproto.StorePath]nixproto.StorePath) (*settled, error) {
	out := &settled{name: o.name, staged: o}
	switch kind {
	case nixproto.InputAddressed:
		out.info.Path = o.seen
		out.info.References = o.references()
	case nixproto.FixedOutput:
		if err := settleFixed(j, o, &out.info); err != nil {
			return nil, err
		}
	default:
		if err := b.settleFloating(ctx, j, o, final, &out.info); err != nil {
			return nil, err
		}
	}
	slices.Sort(out.info.References)
	out.info.NarHash, out.info.NarSize = o.staged.NarHash(), o.staged.NarSize()
	return out, nil
}

// settleFixed checks the output of a fixed-output derivation.
func settleFixed(j *job, o *producedOutput, info *nixproto.PathInfo) error {
	wanted, err := j.drv.Outputs[o.name].ContentAddress()
	if err != nil {
		return err
	}
	got, err := address(o, wanted.Method, wanted.Hash.Algo(), nil, false)
	if err != nil {
		return err
	}
	if got != wanted {
		return rejectf("hash mismatch in fixed-output derivation '%s':\n  specified: %s\n     got:    %s",
			j.drvPath, wanted.Hash.SRI(), got.Hash.SRI())
	}
	if refs := o.references(); len(refs) > 0 {
		return rejectf("the output of the fixed-output derivation '%s' must not have references to store paths, and it refers to %d, for example '%s'",
			j.drvPath, len(refs), refs[0])
	}
	info.Path, info.CA = o.seen, wanted.String()
	return nil
}

// settleFloating finds the path of a floating content-addressed output from its
// contents, and puts that path, and the final ones of its siblings, in place of
// those that the builder saw.
func (b *Builds) settleFloating(ctx context.Context, j *job, o *producedOutput, final map[nixproto.StorePath]nixproto.StorePath, info *nixproto.PathInfo) error {
	method, algo, err := j.drv.Outputs[o.name].Method()
	if err != nil {
		return err
	}
	rewrites := make(map[nixproto.StorePath]nixproto.StorePath)
	self := false
	for _, r := range o.references() {
		if r == o.seen {
			self = true
			continue
		}
		if to, ok := final[r]; ok {
			rewrites[r] = to
			r = to
		}
		info.References = append(info.References, r)
	}
	got, err := address(o, method, algo, rewrites, j.beforeSelfHash)
	if err != nil {
		return err
	}
	name := nixproto.OutputPathName(j.drv.Name, o.name)
	if info.Path, err = got.Path(name, info.References, self); err != nil {
		return rejectf("output '%s' of '%s' cannot be content-addressed: %v", o.name, j.drvPath, err)
	}
	info.CA = got.String()
	if self {
		info.References = append(info.References, info.Path)
		rewrites[o.seen] = info.Path
	}
	if len(rewrites) == 0 {
		return nil
	}
	return b.rewrite(ctx, o, rewrites)
}

// address computes the content address of an output, with other paths in place
// of its siblings'; legacy as Nix before 2.17 does.
func address(o *producedOutput, method nixproto.CAMethod, algo nixproto.HashAlgo, rewrites map[nixproto.StorePath]nixproto.StorePath, legacy bool) (nixproto.ContentAddress, error) {
	var none nixproto.ContentAddress
	if root := o.staged.Index()[0]; method != nixproto.CANAR && (root.Kind != nar.Regular || root.Executable) {
		return none, rejectf("output path '%s' should be a non-executable regular file, because its outputHashMode is flat or text", o.seen)
	}
	var self nixproto.StorePath
	if method == nixproto.CANAR && slices.Contains(o.references(), o.seen) {
		self = o.seen
	}
	h, err := nixproto.NewCAHasher(method, algo, self)
	if err != nil {
		return none, rejectf("output '%s': %v", o.name, err)
	}
	if err := copyRewritten(h, o.reader(), rewrites); err != nil {
		return none, err
	}
	if legacy {
		return h.LegacySum()
	}
	return h.Sum()
}

// rewrite replaces an output by a copy with other paths in it.
func (b *Builds) rewrite(ctx context.Context, o *producedOutput, rewrites map[nixproto.StorePath]nixproto.StorePath) error {
	staged, err := b.store.Stage(ctx, o.account)
	if err != nil {
		return err
	}
	err = copyRewritten(staged, o.reader(), rewrites)
	if err == nil {
		err = staged.Finish()
	}
	if errors.Is(err, store.ErrInvalid) {
		// A file may be named after a path; its new name breaks the order.
		err = rejectf("output '%s' cannot be content-addressed: its paths occur in names of files: %v", o.name, err)
	}
	if err != nil {
		staged.Discard()
		return err
	}
	o.staged.Discard()
	o.staged = staged
	return nil
}

// copyRewritten copies r to w with paths replaced.
func copyRewritten(w io.Writer, r io.Reader, rewrites map[nixproto.StorePath]nixproto.StorePath) error {
	buf := make([]byte, 256<<10)
	if len(rewrites) == 0 {
		_, err := io.CopyBuffer(onlyWriter{w}, r, buf)
		return err
	}
	rw := nixproto.NewRewriter(w, rewrites)
	if _, err := io.CopyBuffer(onlyWriter{rw}, r, buf); err != nil {
		return err
	}
	return rw.Close()
}

// An onlyWriter hides other methods of a Writer from io.Copy, which would not
// use its buffer.
type onlyWriter struct{ io.Writer }

// replace makes outputs valid in place of damaged ones.
func (b *Builds) replace(ctx context.Context, s *Session, j *job, outs map[string]store.ResultOutput, staged map[string]*store.Staged) error {
	up, err := s.Sight.NewUpload(ctx, store.UploadOptions{Repair: true})
	if err != nil {
		return err
	}
	defer up.Abort()
	regs, err := b.registrations(ctx, j, outs, nil, staged)
	if err != nil {
		return err
	}
	for _, r := range regs {
		if err := up.Add(&r.Info, io.NewSectionReader(r.Staged, 0, int64(r.Info.NarSize))); err != nil {
			return fmt.Errorf("replace %s: %w", r.Info.Path, err)
		}
	}
	return up.Commit()
}

// compare says whether outputs are the same as those that are valid.
func (b *Builds) compare(ctx context.Context, s *Session, j *job, outs []*settled) error {
	for _, out := range outs {
		info, err := s.Sight.Info(ctx, out.info.Path)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err != nil || info.NarHash != out.info.NarHash {
			return &outputError{nixproto.NotDeterministic,
				fmt.Sprintf("derivation '%s' may not be deterministic: output '%s' differs", j.drvPath, out.info.Path)}
		}
	}
	return nil
}

// intact reports whether the contents of paths are what was stored.
func (b *Builds) intact(ctx context.Context, s *Session, paths map[string]nixproto.StorePath) (bool, error) {
	for _, p := range paths {
		info, err := s.Sight.Info(ctx, p)
		if err != nil {
			return false, err
		}
		same, err := b.blobIntact(ctx, info)
		if err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

func (b *Builds) blobIntact(ctx context.Context, info *nixproto.PathInfo) (bool, error) {
	blob, err := b.store.OpenBlob(ctx, info.NarHash)
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDamaged) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer blob.Close()
	h := sha256.New()
	n, err := io.Copy(h, io.NewSectionReader(blob, 0, blob.Size()))
	if errors.Is(err, store.ErrDamaged) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return uint64(n) == info.NarSize && nixproto.HashFromSum(nixproto.SHA256, h) == info.NarHash, nil
}
