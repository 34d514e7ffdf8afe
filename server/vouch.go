package server

import (
	"crypto/sha256"
	"slices"
	"strings"
	"sync"

	"nbd/nixproto"
)

// What an account brought by a key with store:write it vouches for: whoever
// copies it from here can check it with the account's public key, as he can
// check what was built. The signature is made when somebody asks, and is not
// kept with the path: what the account offers others (offer-signed) is what it
// has signed itself or had built.

// vouch returns info with the account's signature, if the account may be the
// one to say what the path is: it is in the own view, and neither its content
// address nor its account's signature tells already.
func (ss *session) vouch(info *nixproto.PathInfo) (*nixproto.PathInfo, error) {
	name, _, _ := strings.Cut(ss.Client.Account.PublicKey, ":")
	signed := slices.ContainsFunc(info.Signatures, func(sig string) bool { return strings.HasPrefix(sig, name+":") })
	if info.CA != "" || signed {
		return info, nil
	}
	if own, err := ss.Sight.Own(ss.ctx, info.Path); err != nil || !own {
		return info, err
	}
	sig, err := ss.server.vouchers.sign(ss, info)
	if err != nil {
		return nil, err
	}
	vouched := *info
	vouched.Signatures = append(slices.Clip(info.Signatures), sig)
	return &vouched, nil
}

// vouchers remembers signatures, which take as long to make as all else of an
// answer. It is safe for concurrent use.
type vouchers struct {
	mu         sync.Mutex
	young, old map[[sha256.Size]byte]string // by account and fingerprint
}

// vouchersMax bounds each of the two halves of what is remembered; a signature
// takes some 250 bytes.
const vouchersMax = 1 << 16

func (v *vouchers) sign(ss *session, info *nixproto.PathInfo) (string, error) {
	fingerprint := info.Fingerprint()
	id := sha256.Sum256([]byte(ss.Client.Account.PublicKey + " " + fingerprint))
	v.mu.Lock()
	sig, ok := v.young[id]
	if !ok {
		sig, ok = v.old[id]
	}
	v.mu.Unlock()
	if ok {
		return sig, nil
	}
	key, err := ss.server.store.SigningKey(ss.ctx, ss.account())
	if err != nil {
		return "", err
	}
	sig = key.Sign(fingerprint)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.young == nil || len(v.young) == vouchersMax {
		v.old, v.young = v.young, make(map[[sha256.Size]byte]string)
	}
	v.young[id] = sig
	return sig, nil
}
