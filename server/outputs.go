package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

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
	staged *producedOutput // nil if the path is valid already and stays as it is
}

// finish turns what a run produced into valid outputs: it finds their final
// paths and references, applies the derivation's checks, and registers them for
// the account, all at once. In nixproto.BuildCheck it compares them instead. What is the
// build's fault is an *outputError.
func (b *Builds) finish(ctx context.Context, j *job, in *jobInputs, lease *store.Lease, a *attempt, p *produced) ([]store.BuildOutput, map[string]nixproto.StorePath, error) {
	if missing := p.missing(); len(missing) > 0 {
		return nil, nil, rejectf("builder for '%s' failed to produce output '%s'", j.drvPath, missing[0])
	}
	outs, err := b.settle(ctx, j, p)
	if err != nil {
		return nil, nil, err
	}
	kept, err := b.keptClosure(ctx, j, outs)
	if err != nil {
		return nil, nil, err
	}
	if err := checkOutputs(j, append(kept, in.closure...), outs); err != nil {
		return nil, nil, err
	}
	paths := make(map[string]nixproto.StorePath, len(outs))
	var recorded []store.BuildOutput
	for _, out := range outs {
		paths[out.name] = out.info.Path
		recorded = append(recorded, store.BuildOutput{
			Name: out.name, Path: out.info.Path, NarHash: out.info.NarHash, NarSize: out.info.NarSize,
		})
		lease.Add(out.info.Path)
	}
	slices.SortFunc(recorded, func(a, b store.BuildOutput) int { return strings.Compare(a.Name, b.Name) })
	if j.mode == nixproto.BuildCheck {
		return recorded, paths, b.compare(ctx, j, outs)
	}
	if err := b.register(ctx, j, outs); err != nil {
		return nil, nil, err
	}
	if err := b.realise(ctx, j, paths); err != nil {
		return nil, nil, err
	}
	if j.mode == nixproto.BuildNormal && len(kept) == 0 {
		err = b.putResult(ctx, in.key, j, a.record.ID, outs)
	}
	return recorded, paths, err
}

// keptClosure returns the closure of those outputs that were valid before.
// Where there are any, what the account has is no result of this run alone.
func (b *Builds) keptClosure(ctx context.Context, j *job, outs []*settled) ([]nixproto.PathInfo, error) {
	var kept []nixproto.StorePath
	for _, out := range outs {
		if out.staged == nil {
			kept = append(kept, out.info.Path)
		}
	}
	if len(kept) == 0 {
		return nil, nil
	}
	return b.store.ClosureInfo(ctx, j.account, kept)
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
		if j.mode == nixproto.BuildNormal {
			info, err := b.store.Info(ctx, j.account, o.seen)
			if err == nil { // it was there before the others; it stays as it is
				return &settled{name: o.name, info: *info}, nil
			} else if !errors.Is(err, store.ErrNotFound) {
				return nil, err
			}
		}
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
	out.info.Deriver = j.drvPath
	out.info.RegistrationTime = time.Now().Unix()
	out.info.Ultimate = true
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

// register signs the outputs and makes them valid for the account.
func (b *Builds) register(ctx context.Context, j *job, outs []*settled) error {
	key, err := b.store.SigningKey(ctx, j.account)
	if err != nil {
		return err
	}
	var regs []store.Registration
	for _, out := range outs {
		if out.staged == nil {
			continue
		}
		out.info.Sign(key)
		regs = append(regs, store.Registration{Info: out.info, Staged: out.staged.staged})
	}
	if j.mode == nixproto.BuildRepair {
		return b.replace(ctx, j, regs)
	}
	return b.store.Register(ctx, j.account, regs)
}

// replace makes outputs valid in place of damaged ones.
func (b *Builds) replace(ctx context.Context, j *job, regs []store.Registration) error {
	up, err := b.store.NewUpload(ctx, j.account, store.UploadOptions{Repair: true})
	if err != nil {
		return err
	}
	defer up.Abort()
	for _, r := range regs {
		if err := up.Add(&r.Info, io.NewSectionReader(r.Staged, 0, int64(r.Info.NarSize))); err != nil {
			return fmt.Errorf("replace %s: %w", r.Info.Path, err)
		}
	}
	return up.Commit()
}

// realise records which paths the outputs became, where that does not follow
// from the derivation that the client knows.
func (b *Builds) realise(ctx context.Context, j *job, paths map[string]nixproto.StorePath) error {
	kind, err := j.drv.Kind()
	if err != nil {
		return err
	}
	if kind != nixproto.Floating && j.resolved.IsZero() {
		return nil
	}
	key, err := b.store.SigningKey(ctx, j.account)
	if err != nil {
		return err
	}
	for _, hash := range []nixproto.Hash{j.hash, j.resolved} {
		if hash.IsZero() {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(paths)) {
			r := nixproto.Realisation{DrvHash: hash, OutputName: name, OutPath: paths[name]}
			r.Sign(key)
			if err := b.store.AddRealisation(ctx, j.account, &r); err != nil {
				return fmt.Errorf("record realisation %s: %w", r.ID(), err)
			}
		}
	}
	return nil
}

// compare says whether outputs are the same as those that are valid.
func (b *Builds) compare(ctx context.Context, j *job, outs []*settled) error {
	for _, out := range outs {
		info, err := b.store.Info(ctx, j.account, out.info.Path)
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
func (b *Builds) intact(ctx context.Context, a store.AccountID, paths map[string]nixproto.StorePath) (bool, error) {
	for _, p := range paths {
		info, err := b.store.Info(ctx, a, p)
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

// putResult stores a success under its key; the first one stays.
func (b *Builds) putResult(ctx context.Context, key reuse.Key, j *job, id store.BuildID, outs []*settled) error {
	r := &store.Result{Build: id, Account: j.account, Time: time.Now(), Outputs: make(map[string]store.ResultOutput, len(outs))}
	for _, out := range outs {
		r.Outputs[out.name] = store.ResultOutput{
			Path: out.info.Path, NarHash: out.info.NarHash, NarSize: out.info.NarSize,
			References: out.info.References, CA: out.info.CA,
		}
	}
	return b.store.EndBuild(ctx, nil, store.End{Key: key, Shared: true, Success: r})
}
