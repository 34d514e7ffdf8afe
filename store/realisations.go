package store

import (
	"context"
	"fmt"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// realisationKey returns the key of an output of a derivation.
func realisationKey(drvHash nixproto.Hash, output string) []byte {
	k := append([]byte{byte(drvHash.Algo())}, drvHash.Bytes()...)
	return append(k, output...)
}

// AddRealisation stores r in the view; an earlier one of the same output is
// replaced. An output path that is not in the view is ErrInvalid.
func (s *Store) AddRealisation(ctx context.Context, a AccountID, r *nixproto.Realisation) error {
	if r.DrvHash.IsZero() || r.OutputName == "" {
		return fmt.Errorf("%w realisation: it names no output of a derivation", ErrInvalid)
	}
	return s.update(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return err
		}
		if !v.has(r.OutPath) {
			return fmt.Errorf("%w realisation: %s is not valid", ErrInvalid, r.OutPath)
		}
		return v.realisations().Put(realisationKey(r.DrvHash, r.OutputName), append([]byte{jsonVersion}, r.JSON()...))
	})
}

// Realisation returns the realisation of an output of the derivation with that
// hash modulo, or ErrNotFound; also if the output path is not in the view any
// more.
func (s *Store) Realisation(ctx context.Context, a AccountID, drvHash nixproto.Hash, output string) (*nixproto.Realisation, error) {
	var r *nixproto.Realisation
	err := s.readView(a, func(v *view) error {
		real, out, err := v.realisation(drvHash, output)
		if err == nil && out == nil {
			err = fmt.Errorf("realisation of %s!%s: %w", drvHash, output, ErrNotFound)
		}
		r = real
		return err
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// realisation returns a realisation of the view and the record of its output
// path; nil if either is not there.
func (v *view) realisation(drvHash nixproto.Hash, output string) (*nixproto.Realisation, *record, error) {
	b := v.realisations().Get(realisationKey(drvHash, output))
	if b == nil {
		return nil, nil, nil
	}
	if b[0] != jsonVersion {
		return nil, nil, fmt.Errorf("realisation: %w: version %d", ErrDamaged, b[0])
	}
	r, err := nixproto.ParseRealisation(b[1:])
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	out, err := v.get(r.OutPath)
	if out == nil || err != nil {
		return nil, nil, err
	}
	return &r, out, nil
}
