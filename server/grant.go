package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// grant makes the outputs of a success, whose contents are held, valid in the
// own view of the account that asked for j: with its signature, and with its
// realisations. A path that the view has already stays as it is. The session
// keeps the paths.
//
// It is the one way by which content enters a view for an equal key: for a
// stored success, and for everybody who waited for a run.
func (b *Builds) grant(ctx context.Context, s *Session, j *job, outs map[string]store.ResultOutput) (map[string]nixproto.StorePath, error) {
	paths := make(map[string]nixproto.StorePath, len(outs))
	for name, out := range outs {
		paths[name] = out.Path
	}
	wanted := slices.Sorted(maps.Values(paths))
	s.Keep(wanted...)
	valid, err := b.store.Valid(ctx, j.account, wanted)
	if err != nil {
		return nil, err
	}
	if err := b.registerOutputs(ctx, s, j, outs, valid, nil); err != nil {
		return nil, err
	}
	return paths, b.realise(ctx, j, paths)
}

// registerOutputs registers the outputs that are not among valid, signed by the
// account. Staged are their contents by name, where those are not stored yet.
func (b *Builds) registerOutputs(ctx context.Context, s *Session, j *job, outs map[string]store.ResultOutput, valid []nixproto.StorePath, staged map[string]*store.Staged) error {
	regs, err := b.registrations(ctx, j, outs, valid, staged)
	if err != nil || len(regs) == 0 {
		return err
	}
	return s.Sight.Register(ctx, regs)
}

func (b *Builds) registrations(ctx context.Context, j *job, outs map[string]store.ResultOutput, valid []nixproto.StorePath, staged map[string]*store.Staged) ([]store.Registration, error) {
	var regs []store.Registration
	now := time.Now().Unix()
	for _, name := range slices.Sorted(maps.Keys(outs)) {
		out := outs[name]
		if slices.Contains(valid, out.Path) {
			continue
		}
		regs = append(regs, store.Registration{Staged: staged[name], Info: nixproto.PathInfo{
			Path: out.Path, NarHash: out.NarHash, NarSize: out.NarSize, References: slices.Clone(out.References), CA: out.CA,
			Deriver: j.drvPath, RegistrationTime: now, Ultimate: true,
		}})
	}
	if len(regs) == 0 {
		return nil, nil
	}
	key, err := b.store.SigningKey(ctx, j.account)
	if err != nil {
		return nil, err
	}
	for i := range regs {
		regs[i].Info.Sign(key)
	}
	return regs, nil
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
	wanted := slices.Sorted(maps.Values(paths))
	own, err := b.store.Valid(ctx, j.account, wanted)
	if err != nil || len(own) < len(wanted) {
		return err // what is lent is another's word
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
			old, err := b.store.Realisation(ctx, j.account, hash, name)
			if err == nil && old.OutPath == paths[name] {
				continue
			} else if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			r := nixproto.Realisation{DrvHash: hash, OutputName: name, OutPath: paths[name]}
			r.Sign(key)
			if err := b.store.AddRealisation(ctx, j.account, &r); err != nil {
				return fmt.Errorf("record realisation %s: %w", r.ID(), err)
			}
		}
	}
	return nil
}

// recorded are outputs as records have them.
func recorded(outs map[string]store.ResultOutput) []store.BuildOutput {
	var list []store.BuildOutput
	for _, name := range slices.Sorted(maps.Keys(outs)) {
		out := outs[name]
		list = append(list, store.BuildOutput{Name: name, Path: out.Path, NarHash: out.NarHash, NarSize: out.NarSize})
	}
	return list
}
