package server

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// Whether outputs may enter the own view of an account is a question of that
// account: it may have no room for them, and an output that its view has already
// stays as it is, beside which the new ones must be what the derivation demands.
// Neither says anything of the build, which may answer others.

// admit returns why the outputs of j may not enter its account's own view; nil
// if they may. What is new of them counts for max-storage then.
func (b *Builds) admit(ctx context.Context, s *Session, j *job, outs map[string]store.ResultOutput) (refused *ending, err error) {
	var paths []nixproto.StorePath
	for _, out := range outs {
		paths = append(paths, out.Path)
	}
	valid, err := b.store.Valid(ctx, j.account, paths)
	if err != nil || len(valid) == len(paths) {
		return nil, err
	}
	if err := b.checkBeside(ctx, s, j, outs, valid); err != nil {
		return refusedEntry(j, nixproto.OutputRejected, err)
	}
	size := uint64(0)
	for _, out := range outs {
		if !slices.Contains(valid, out.Path) {
			size += out.NarSize
		}
	}
	if err := s.checkStorage(ctx, size); err != nil {
		return refusedEntry(j, nixproto.MiscFailure, err)
	}
	return nil, nil
}

// refusedEntry is the end for an account that outputs may not enter; an error of
// our own stays one.
func refusedEntry(j *job, code nixproto.BuildStatus, err error) (*ending, error) {
	var output *outputError
	switch {
	case errors.As(err, &output):
	case isRefusal(err):
		err = fmt.Errorf("cannot build '%s': %w", j.drvPath, err)
	default:
		return nil, err
	}
	return &ending{status: reuse.ClientError, code: code, drvPath: j.drvPath, message: printable(err.Error()), counts: true}, nil
}

// checkBeside applies the derivation's checks to outputs that get valid beside
// others that were valid before, and stay. An *outputError says what is wrong.
func (b *Builds) checkBeside(ctx context.Context, s *Session, j *job, outs map[string]store.ResultOutput, valid []nixproto.StorePath) error {
	var list []*settled
	same := true
	for name, out := range outs {
		made := &settled{name: name, info: nixproto.PathInfo{Path: out.Path, NarHash: out.NarHash, NarSize: out.NarSize, References: out.References, CA: out.CA}}
		if slices.Contains(valid, out.Path) {
			info, err := b.store.Info(ctx, j.account, out.Path)
			if err != nil {
				return err
			}
			same = same && info.NarHash == out.NarHash && slices.Equal(info.References, out.References)
			made.info, made.old = *info, true
		}
		list = append(list, made)
	}
	if same {
		return nil
	}
	known, err := s.Sight.ClosureInfo(ctx, slices.Concat(valid, j.drv.InputSrcs))
	if err != nil {
		return err
	}
	return checkOutputs(j, known, list)
}

// registrar returns the request for whose account the outputs of an attempt are
// registered: that of its owner, if they may enter there, else of another that
// waits. If they may enter nowhere there is the end that this comes to.
func (b *Builds) registrar(ctx context.Context, f *flight, owner *request, outs map[string]store.ResultOutput) (r *request, refused *ending, err error) {
	members, _ := f.Members()
	for i, r := range append([]*request{owner}, members...) {
		if i > 0 && r == owner {
			continue
		}
		end, err := b.admit(ctx, r.session, r.job, outs)
		if err != nil {
			return nil, nil, err
		}
		if end == nil {
			return r, nil, nil
		}
		if refused == nil {
			refused = end
		}
	}
	return nil, refused, nil
}

// enter grants the outputs of a success to the account of r. It returns the end
// for it, which is another one if they may not enter there.
func (b *Builds) enter(ctx context.Context, r *request, success *ending, outs map[string]store.ResultOutput) (*ending, error) {
	refused, err := b.admit(ctx, r.session, r.job, outs)
	if err != nil {
		return nil, err
	}
	if refused != nil {
		r.decide("view", true, firstLine(refused.message))
		return refused, nil
	}
	success.paths, err = b.grant(ctx, r.session, r.job, outs)
	return success, err
}
