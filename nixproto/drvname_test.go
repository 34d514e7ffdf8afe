package nixproto

import "testing"

// TestParseName has names as builtins.parseDrvName of Nix 2.34 splits them.
func TestParseName(t *testing.T) {
	for _, tt := range [][3]string{
		{"hello-2.12.1", "hello", "2.12.1"},
		{"hello", "hello", ""},
		{"nix-0.12pre12876", "nix", "0.12pre12876"},
		{"python3.12-foo-bar-1.0", "python3.12-foo-bar", "1.0"},
		{"foo-unstable-2024-01-02", "foo-unstable", "2024-01-02"},
		{"foo--1", "foo", "-1"},
		{"foo-", "foo-", ""},
		{"-1", "", "1"},
		{"", "", ""},
		{"a-B-_x", "a-B", "_x"},
	} {
		if pkg, version := ParseName(tt[0]); pkg != tt[1] || version != tt[2] {
			t.Errorf("%q is %q, %q; want %q, %q", tt[0], pkg, version, tt[1], tt[2])
		}
	}
}

// TestCompareVersions has the examples of Nix's manual and tests, each also the
// other way round.
func TestCompareVersions(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"1.0", "2.3", -1}, {"2.1", "2.3", -1}, {"2.3", "2.3", 0}, {"2.5", "2.3", 1}, {"3.1", "2.3", 1},
		{"2.3.1", "2.3", 1}, {"2.3.1", "2.3a", 1}, {"2.3pre1", "2.3", -1}, {"2.3pre3", "2.3pre12", -1},
		{"2.3a", "2.3c", -1}, {"2.3pre1", "2.3c", -1}, {"2.3pre1", "2.3q", -1}, {"", "1", -1}, {"1.01", "1.1", 0},
		{"9999999999999999999999", "10000000000000000000000", -1}, {"", "", 0}, {"1.2", "1-2", 0},
	} {
		if got := CompareVersions(tt.a, tt.b); got != tt.want {
			t.Errorf("%q, %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
		if got := CompareVersions(tt.b, tt.a); got != -tt.want {
			t.Errorf("%q, %q: %d, want %d", tt.b, tt.a, got, -tt.want)
		}
	}
}

func TestCommonComponents(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"1.2.3", "1.2.4", 2}, {"1.2", "1.2.4", 2}, {"1.2", "2.2", 0}, {"", "1", 0}, {"1.02", "1.2", 2}, {"2024-01-02", "2024-01-05", 2}} {
		if got := CommonComponents(tt.a, tt.b); got != tt.want {
			t.Errorf("%q, %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
