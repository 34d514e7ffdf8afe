package nixproto

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
)

// Replaced by hash.go and realisation.go.

func pendingHashHex(h Hash) string { return hex.EncodeToString(h.sum[:h.algo.Size()]) }

func pendingParseHash(s string) (h Hash, err error) {
	raw, err := hex.DecodeString(strings.TrimPrefix(s, "sha256:"))
	if err != nil || len(raw) != 32 {
		return h, fmt.Errorf("hash %q", clip(s))
	}
	h.algo = SHA256
	copy(h.sum[:], raw)
	return h, nil
}

func pendingID(r Realisation) string {
	return "sha256:" + pendingHashHex(r.DrvHash) + "!" + r.OutputName
}

func pendingJSON(r Realisation) []byte {
	b, _ := json.Marshal(map[string]any{"id": pendingID(r), "outPath": r.OutPath.Base()})
	return b
}

func pendingParseID(s string) (Hash, string, error) {
	a, b, _ := strings.Cut(s, "!")
	h, err := pendingParseHash(a)
	return h, b, err
}

func pendingParse(b []byte) (r Realisation, err error) {
	var v struct{ ID, OutPath string }
	if err = json.Unmarshal(b, &v); err != nil {
		return r, err
	}
	if r.DrvHash, r.OutputName, err = pendingParseID(v.ID); err != nil {
		return r, err
	}
	r.OutPath, err = ParseBaseName(v.OutPath)
	return r, err
}
