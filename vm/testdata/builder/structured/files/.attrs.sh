declare PATH='/nix/store/s1y78axx3ky46cgzv60pyry4irrlv0pl-busybox/bin'
declare _ok1=1
declare builder='/nix/store/s1y78axx3ky46cgzv60pyry4irrlv0pl-busybox/bin/busybox'
declare control=''
declare empty=''
declare -a emptyList=()
declare -A emptySet=()
declare f0=0
declare f2=1
declare f3=-2147483648
declare f4=-2147483648
declare f5=-2147483648
declare f6=-2147483648
declare f7=-2147483648
declare fb=16777216
declare fc=-2
declare fd=-2147483648
declare ff=-2147483648
declare fk=-2147483648
declare fm=-2147483648
declare i0=0
declare i1=-1
declare i2=2147483647
declare i3=-2147483648
declare i4=2147483647
declare i5=1
declare i6=5
declare -a listOfInts=(1 2 3 )
declare -a listOfMixed=('a b' 1 1  '' 'it'\''s' )
declare name='structured'
declare no=
declare nothing=''
declare -A outputs=(['out']='/nix/store/p6wzqd12pxb2cxia544n2h7z2sja44dk-structured' )
declare -a passAsFile=('string' )
declare ref='/nix/store/9yz6ic3zn7kn4k3jqlhxik64qs9r3w2d-leaf'
declare self='/nix/store/p6wzqd12pxb2cxia544n2h7z2sja44dk-structured'
declare -A set=(['a']=1 ['b c']='d'\''e' ['f']='' ['g']=1 )
declare string='quo'\''te "double" back\slash
newline	tabreturnbü☃𝄞'
declare system='x86_64-linux'
declare yes=1
